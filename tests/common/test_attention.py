"""Documents packed into one row must be as strangers: neither forwards nor backwards may one reach another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.attention import document_attention
from common.config import LoraConfig
from common.models import LoraModel, load, save_adapter
from common.text import Example, Pack, pack
from tests_common import LORA, random_examples  # noqa: F401
