"""Settings of learned methods that cannot be meant are refused as they are made, by name."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import samerge_ext as sm

CONFIGS = (
    sm.SAMergingConfig,
    sm.AdaMergingConfig,
    sm.StatsMergingConfig,
    sm.DistillationConfig,
    sm.DisTaCConfig,
    sm.MergedDistillationConfig,
)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_has_a_type(config):
    """None of the values fits all fields, and each that does not names its own."""
    for key in (field.name for field in fields(config)):
        refused = 0
        for value in (math.nan, math.inf, "some", 1j, [1], {1: 1.0}, {"a": math.nan}, 10**400, object()):
            try:
                config(**{key: value})
            except ValueError as error:
                assert str(error).startswith((f"{key}=", "host_memory_budget goes"))
                refused += 1
        assert refused >= 8, key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", math.inf, "steps=inf; expected a whole number or none"),
        ("steps", 2.5, "steps=2.5; expected a whole number"),
        ("steps", True, "steps=True; expected a whole number"),
        ("epochs", 0, "epochs=0; expected a number ≥ 1"),
        ("rho", math.nan, "rho=nan; expected a finite number"),
        ("rho", -0.1, "rho=-0.1; expected a number ≥ 0"),
        ("initial_coefficient", math.inf, "initial_coefficient=inf; expected a finite number"),
        ("temperature", 0.0, "temperature=0.0; expected a number > 0"),
        ("beta", 1.5, r"beta=1.5; expected a number in \[0, 1\]"),
        ("temperature", math.inf, "temperature=inf; expected a finite number"),
        ("adaptive", "no", "adaptive='no'; expected true or false"),
        ("sam", "papre", "sam='papre'; choose one of 'paper', 'published', 'off'"),
        ("seed", 2**64, "seed=18446744073709551616; expected a whole number of 64 bits"),
        ("task_weights", [1], r"task_weights=\[1\]; expected a finite number for every name or none"),
        ("task_weights", {"a": math.inf}, "task_weights={'a': inf}; expected a finite number for every name"),
        ("checkpoint_dir", 5, "checkpoint_dir=5; expected a text or a path or none"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        sm.SAMergingConfig(**{key: value})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (sm.SAMergingConfig, {"beta": 0.5}, "is for the divergence of beta=0"),
        (sm.SAMergingConfig, {"confidence_weights": True}, "read all classes of the teachers"),
        (sm.SAMergingConfig, {"samples": 4}, "read all classes of the teachers"),
        (sm.StatsMergingConfig, {}, "is for loss='kl'"),
    ],
)
def test_what_needs_all_classes_of_a_teacher_is_refused_with_few(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(teacher_top_k=8, **settings)
    config(**settings)


def test_numbers_and_paths_of_any_kind_are_taken():
    config = sm.SAMergingConfig(rho=1, steps=np.int64(3), learning_rate=np.float32(0.1), checkpoint_dir=Path("x"), seed=-1)
    assert config.steps == 3 and config.task_weights is None
