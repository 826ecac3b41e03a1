"""`python -m pytest tests/gpu` runs the checks on a GPU; with --dry it runs them on the CPU, to check the checks."""

import os

import pytest


def pytest_addoption(parser):
    parser.addoption("--dry", action="store_true", help="run what makes sense there on the CPU, with small shapes")


def pytest_configure(config):
    if config.getoption("dry"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported


def pytest_sessionstart(session):
    import torch

    if not session.config.getoption("dry") and not torch.cuda.is_available():
        pytest.exit("torch finds no GPU on this machine; --dry runs the checks on the CPU", returncode=2)
