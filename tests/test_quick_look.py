"""A quick look says what the plain computation says, whatever was kept of the look before."""

import math

import pytest
import torch
from small_runs import small_config
from test_architectures import *  # noqa: F401, F403
