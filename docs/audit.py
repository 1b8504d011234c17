"""What the Python advisory database knows of the installed packages, by pip-audit: `python docs/audit.py PIP_AUDIT REQUIREMENTS`. `make audit` runs this.

pip-audit says that it found nothing also where it could ask nobody. Here that is a failure of its own, and what was not audited is counted.
"""

import json
import subprocess
import sys

NOT_ASKED = "Nothing was audited: {why}. Run it where https://pypi.org and its advisories can be reached."


def told(report: dict) -> tuple[int, str]:  # exit status: 0 nothing known, 1 faults known, 2 nothing audited; and what to say
    "What a report of pip-audit comes to."
    packages = report["dependencies"]
    asked, skipped = ([package for package in packages if ("skip_reason" in package) == out] for out in (False, True))
    if not asked:
        return 2, NOT_ASKED.format(why=f"the index that answers here knows none of the {len(packages)} packages")
    faults = [f"{package['name']} {package['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version'}" for package in asked for fault in package["vulns"]]
    rest = f"; {len(skipped)} could not be asked about: {', '.join(package['name'] for package in skipped)}" if skipped else ""
    return int(bool(faults)), "\n".join([*faults, f"{len(asked)} packages audited, {len(faults)} known faults{rest}."])


def main(program: str, requirements: str) -> int:
    "Run pip-audit and say what it found."
    words = [program, "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--requirement", requirements]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        status, text = told(json.loads(done.stdout))
    except ValueError:  # it came to no report
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        status, text = 2, NOT_ASKED.format(why=f"pip-audit failed ({lines[-1]})")
    print(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
