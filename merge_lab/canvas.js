// The front end of merge_lab's views: it draws the state that Python sends and sends back what was done. It holds no model, loads
// nothing, and sets every text as textContent, so that what a model or a data set says is never read as HTML.

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (["value", "disabled", "selected"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Of an element that takes keys, which may have the focus: without this, Notebook 7 folds its headings at an arrow before the element hears of it.
const ITS_OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

// A part of the page that is drawn anew when its inputs have changed; what had the focus has it again.
function section(parent, name, draw) {
  const box = make("div", { class: name });
  parent.append(box);
  let before;
  return (...inputs) => {
    const now = JSON.stringify(inputs);
    if (now === before) return;
    before = now;
    const active = box.getRootNode().activeElement;
    const key = active && box.contains(active) ? active.dataset.key : undefined;
    box.replaceChildren(...[draw(...inputs)].flat().filter(Boolean));
    if (key === undefined) return;
    const same = [...box.querySelectorAll("[data-key]")].find((element) => element.dataset.key === key);
    if (same) same.focus({ preventScroll: true });
  };
}

function choice(label, name, options, value, ask) {
  const change = (event) => ask("set", { name, value: options[event.target.selectedIndex][0] });
  const items = options.map(([key, text]) => make("option", { selected: key === value }, text));
  return make("label", { class: "mlc-choice" }, label, make("select", { "data-key": name, class: `mlc-${name}`, onchange: change }, items));
}

function button(text, key, press, disabled = false, more = "") {
  return make("button", { type: "button", class: `mlc-button mlc-${key} ${more}`, "data-key": key, onclick: press, disabled }, text);
}

function legend(scale) {
  if (!scale) return null;
  const stops = scale.colours.map((colour) => make("span", { class: "mlc-shade", style: { background: colour } }));
  return make("div", { class: "mlc-legend" }, make("span", {}, scale.low), make("span", { class: "mlc-stops" }, stops), make("span", {}, `${scale.high}  ${scale.label}`));
}

// --- tokens -------------------------------------------------------------------------------------------------------

function drawTokens(state, ask, hover) {
  const tokens = state.tokens ?? [];
  const move = (place) => {
    const next = Math.min(Math.max(place, 0), tokens.length - 1);
    const box = spans.getRootNode();
    hover(next);
    [...box.querySelectorAll(".mlc-token")][next]?.focus();
  };
  const spans = make("div", { class: "mlc-text", role: "listbox", "aria-label": "tokens of the answer" }, tokens.map((token, place) =>
    make("span", {
      class: place === state.pinned ? "mlc-token mlc-pinned" : "mlc-token", role: "option", "aria-selected": String(place === state.pinned),
      "data-key": `token-${place}`, tabindex: place === (state.pinned ?? 0) ? "0" : "-1", title: token.tip, ...ITS_OWN_KEYS,
      style: { background: token.colour, color: token.ink },
      onclick: () => ask("pin", { token: place }),
      onpointerenter: () => hover(place), onpointerleave: () => hover(null), onfocus: () => hover(place),
      onkeydown: (event) => {
        const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
        if (event.key in steps) move(place + steps[event.key]);
        else if (event.key === "Home") move(0);
        else if (event.key === "End") move(tokens.length - 1);
        else if (event.key === "Enter" || event.key === " ") ask("pin", { token: place });
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    }, token.text)));
  return [legend(state.scale), spans];
}

function drawCandidates(state, place) {
  const said = place === null || place === undefined ? null : (state.tokens ?? [])[place];
  if (!said) return make("div", { class: "mlc-hint" }, "Point at a token to see what each model would have said; click or press Enter to pin it.");
  const head = make("tr", {}, make("th", {}, "model"), make("th", {}, "log p (nats)"), make("th", {}, "KL to blend"), make("th", { colspan: "9" }, "would say"));
  const rows = said.models.map((model) => make("tr", {}, make("th", { scope: "row" }, model.name), make("td", { class: "mlc-number" }, model.log_p),
    make("td", { class: "mlc-number" }, model.kl), model.candidates.map(([text, p, same]) =>
      make("td", { class: same ? "mlc-said" : "" }, make("code", {}, text), make("span", { class: "mlc-p" }, ` ${p}`)))));
  return [make("div", { class: "mlc-head" }, `token ${place}: `, make("code", {}, said.text), place === state.pinned ? "  (pinned)" : ""), make("table", { class: "mlc-table" }, head, rows)];
}

// Names of modules are long and their columns narrow: what is usual to write shorter is, and the whole name is the tip.
const SHORTER = [[/layer_?norm/g, "norm"], [/attention/g, "attn"], [/feedforward/g, "ffn"]];
const shorter = (name) => SHORTER.reduce((text, [long, short]) => text.replace(long, short), name);

// --- grids --------------------------------------------------------------------------------------------------------

// A row of one cell is as wide as all columns: it is brushed by whatever brushes its row, and a brush that begins or ends there takes all columns.
const within = (selected, row, column, alone) => selected && row >= selected.top && row <= selected.bottom && (alone || (column >= selected.left && column <= selected.right));

function span(grid, from, to) {
  const ends = [from, to].map(([row, column]) => (grid.rows[row].cells.length === 1 ? [0, grid.columns.length - 1] : [column, column]));
  const [top, bottom] = [Math.min(from[0], to[0]), Math.max(from[0], to[0])];
  return { top, bottom, left: Math.min(ends[0][0], ends[1][0]), right: Math.max(ends[0][1], ends[1][1]) };
}

function mark(rows, chosen) {
  rows.forEach((row, r) => row.forEach((cell, c) => cell.classList.toggle("mlc-selected", Boolean(within(chosen, r, c, row.length === 1)))));
}

function drawGrid(grid, selected, ask, select) {
  if (!grid) return null;
  let anchor = null;
  const cells = grid.rows.map((row) => []);
  const open = (row, column) => ask("open", { row, column });
  const go = (event, r, c) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    if (event.key in steps) {
      const row = Math.min(Math.max(r + steps[event.key][0], 0), cells.length - 1);
      const column = Math.min(Math.max(c + steps[event.key][1], 0), cells[row].length - 1);
      if (event.shiftKey) {
        anchor = anchor ?? [r, c];
        select(span(grid, anchor, [row, column]));
      } else anchor = null;
      cells[row][column].focus();
    } else if (event.key === "Enter") open(r, c);
    else if (event.key === " ") select(span(grid, [r, c], [r, c]));
    else if (event.key === "Escape") select(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const body = grid.rows.map((row, r) => {
    const made = row.cells.map((cell, c) => {
      const element = make("td", {
        class: "mlc-cell", role: "gridcell", tabindex: r === 0 && c === 0 ? "0" : "-1", "data-key": `${grid.name}-${r}-${c}`, title: cell.tip, ...ITS_OWN_KEYS,
        "aria-label": cell.tip, colspan: row.cells.length === 1 && grid.columns.length > 1 ? String(grid.columns.length) : undefined,
        style: { background: cell.colour },
        onpointerdown: (event) => { anchor = [r, c]; event.preventDefault(); element.focus(); },
        onpointerenter: (event) => { if (anchor && event.buttons & 1) select(span(grid, anchor, [r, c])); },
        onpointerup: () => { if (anchor && anchor[0] === r && anchor[1] === c) open(r, c); anchor = null; },
        onkeydown: (event) => go(event, r, c),
      });
      cells[r].push(element);
      return element;
    });
    const name = make("th", { scope: "row" }, row.opens === null || row.opens === undefined ? row.name : button(row.name, `row-${grid.name}-${r}`, () => ask("open", { row: r, column: null }), false, "mlc-link"));
    return make("tr", {}, name, made);
  });
  const head = make("tr", {}, make("th", {}), grid.columns.map((column) => make("th", { class: "mlc-column", scope: "col", title: column }, make("span", {}, shorter(column)))));
  const table = make("table", { class: `mlc-grid mlc-grid-${grid.name}`, role: "grid", "aria-label": grid.title }, make("thead", {}, head), make("tbody", {}, body));
  mark(cells, selected);
  return [make("div", { class: "mlc-head" }, grid.title), table, legend(grid.scale), grid.note ? make("div", { class: "mlc-hint" }, grid.note) : null];
}

function renderTokens(model, el, ask) {
  const root = make("div", { class: "mlc mlc-tokens" });
  el.append(root);
  const local = { hover: null, selected: null };
  const bar = section(root, "mlc-bar", (state) => [
    choice("prompt", "row", state.prompts, state.row, ask), choice("answer of", "whose", state.voices, state.whose, ask),
    choice("colour", "quantity", state.quantities, state.quantity, ask), choice("alphas of", "component", state.components, state.component, ask)]);
  const line = section(root, "mlc-status", (text, trouble) => make("span", { class: trouble ? "mlc-trouble" : "", role: "status" }, text));
  const hover = (place) => { local.hover = place; candidates(model.get("shown"), local.hover ?? model.get("shown").pinned); };
  const text = section(root, "mlc-answer", (state) => drawTokens(state, ask, hover));
  const candidates = section(root, "mlc-candidates", drawCandidates);
  const path = section(root, "mlc-path", (steps) => steps.flatMap(([name, depth], place) =>
    [place ? " › " : "", place < steps.length - 1 ? button(name, `path-${depth}`, () => ask("back", { depth }), false, "mlc-link") : make("b", {}, name)]));
  const both = make("div", { class: "mlc-grids" });
  root.append(both);
  const select = (chosen) => {
    local.selected = chosen;
    for (const table of both.querySelectorAll(".mlc-grid")) mark([...table.tBodies[0].rows].map((row) => [...row.querySelectorAll(".mlc-cell")]), chosen);
    brush(model.get("shown").undo, chosen);
  };
  const alphas = section(both, "mlc-side", (grid) => drawGrid(grid, local.selected, ask, select));
  const layers = section(both, "mlc-side", (grid) => drawGrid(grid, local.selected, ask, select));
  const by = make("input", { type: "number", class: "mlc-by", step: "0.05", value: "0.10", min: "-2", max: "2", "aria-label": "shift by" });
  const fixed = make("div", { class: "mlc-brush" }, make("label", {}, "shift the region by ", by));
  root.append(fixed);
  const brush = section(fixed, "mlc-inline", (undo, chosen) => [
    button("Shift", "shift", () => ask("shift", { ...local.selected, by: Number(by.value) }), !chosen), button(`Undo (${undo})`, "undo", () => ask("undo"), !undo),
    make("span", { class: "mlc-hint" }, chosen ? `${both.querySelectorAll(".mlc-grid-alpha .mlc-selected").length} cells are brushed` : "drag over cells of a map (or Shift and arrow keys) to brush a region; click a cell (or Enter) to look into it")]);
  let depth = null;
  return () => {
    const state = model.get("shown");
    if (depth !== JSON.stringify(state.path)) { depth = JSON.stringify(state.path); local.selected = null; }
    bar({ prompts: state.prompts, row: state.row, voices: state.voices, whose: state.whose, quantities: state.quantities, quantity: state.quantity, components: state.components, component: state.component });
    line(state.status, state.trouble);
    text({ tokens: state.tokens, scale: state.scale, pinned: state.pinned });
    candidates({ tokens: state.tokens, pinned: state.pinned }, local.hover ?? state.pinned);
    path(state.path ?? []);
    alphas(state.alphas);
    layers(state.layers);
    brush(state.undo, local.selected);
  };
}

// --- chat ---------------------------------------------------------------------------------------------------------

function renderChat(model, el, ask) {
  const root = make("div", { class: "mlc mlc-chat" });
  el.append(root);
  const system = make("input", { type: "text", class: "mlc-system", placeholder: "none", "aria-label": "instructions to all voices (system)" });
  root.append(make("label", { class: "mlc-wide" }, "instructions ", system));
  const past = section(root, "mlc-past", (messages) => messages.map((message) => make("div", { class: `mlc-message mlc-from-${message.role}` }, make("b", {}, message.role), make("span", {}, message.text))));
  const answers = section(root, "mlc-answers", (voices, busy) => voices.map((voice, place) => make("div", { class: "mlc-voice" },
    make("div", { class: "mlc-head" }, voice.name, make("span", { class: `mlc-state mlc-is-${voice.state}` }, voice.state)),
    make("div", { class: "mlc-said-text", "aria-live": "polite" }, voice.text), voice.error ? make("div", { class: "mlc-trouble" }, voice.error) : null,
    button("This is better", `pick-${place}`, () => ask("pick", { voice: place }), busy || !voice.text, "mlc-pick"))));
  const words = make("textarea", { class: "mlc-question", rows: "2", placeholder: "Ask all of them; Enter sends, Shift and Enter begin a line", "aria-label": "your question" });
  let sent = null, heard = model.get("shown").heard, asked = model.get("shown").asked;  // what was sent stays in its box until it was taken
  const send = () => {
    if (!words.value.trim() || words.value === sent) return;
    sent = words.value;
    ask("ask", { text: sent, system: system.value });
  };
  words.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); send(); }
  });
  system.addEventListener("keydown", (event) => event.stopPropagation());
  root.append(words);
  const buttons = section(root, "mlc-inline", (busy, talked) => [button("Send", "send", send, busy), button("Stop", "stop", () => ask("stop"), !busy), button("New conversation", "new", () => ask("new"), busy || !talked)]);
  const line = section(root, "mlc-status", (text, trouble) => make("span", { class: trouble ? "mlc-trouble" : "", role: "status" }, text));
  return () => {
    const state = model.get("shown");
    if (state.heard !== heard) {  // a question was taken or refused; other actions say nothing of it
      if (state.asked !== asked && words.value === sent) words.value = "";
      [sent, heard, asked] = [null, state.heard, state.asked];
    }
    past(state.messages ?? []);
    answers(state.answers ?? [], state.busy);
    buttons(state.busy, (state.messages ?? []).length > 0);
    line(state.status, state.trouble);
  };
}

const RENDER = { tokens: renderTokens, chat: renderChat };

export default {
  render({ model, el }) {
    const ask = (action, more = {}) => model.send({ action, ...more });  // a message of its own: changes of a trait are thinned out while the kernel is busy
    const draw = RENDER[model.get("kind")](model, el, ask);
    model.on("change:shown", draw);
    draw();
    return () => model.off("change:shown", draw);
  },
};
