"""The learning loop: calibration, checkpoints, and what stops it early."""

import io
from dataclasses import replace

import pytest
import tiny
import torch

import samerge_ext as sm
from samerge_ext.checkpoints.sealed import read_sealed, write_sealed
from samerge_ext.learning.calibration import Calibration


@pytest.fixture
def packed():
    base = tiny.make(0)
    return sm.PackedWeights.from_modules(base, tiny.make_experts(base), dtype=torch.float64)


def run(packed, method=sm.samerging, batches=None, logits=None, config=sm.SAMergingConfig, **settings):
    settings = {"steps": 6, "progress": False, **settings}
    logits = logits or tiny.plain(tiny.make_heads())
    return method(tiny.make(1), packed, batches or tiny.make_batches(), logits, config=config(**settings))


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"shuffle": True, "granularity": "task"}])
def test_an_interrupted_run_continues_to_the_same_numbers(packed, tmp_path, settings):
    settings = {"steps": 10, "checkpoint_every": 3, **settings}
    whole = run(packed, **settings)
    with pytest.raises(tiny.Interrupted):
        run(packed, logits=tiny.interrupt_after(15), checkpoint_dir=tmp_path, **settings)
    passes = []

    def counted(module, batch, task):
        passes.append(torch.is_grad_enabled())
        return tiny.plain(tiny.make_heads())(module, batch, task)

    continued = run(packed, logits=counted, checkpoint_dir=tmp_path, **settings)
    assert torch.equal(continued.coefficients, whole.coefficients)
    assert torch.equal(continued.merged, whole.merged)
    assert continued.history == whole.history
    assert sum(passes) == 4 * 2 * 3, "six of the ten steps were kept"


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "granularity": "task"}])
def test_an_interrupt_at_any_moment_saves_the_last_finished_step(packed, tmp_path, monkeypatch, settings):
    """In a pass, in the optimiser, after it, or while the state is being saved."""
    whole = run(packed, steps=5, learning_rate=0.1, **settings)
    steps = {"optimizer": 0, "passes": 0}

    def in_the_middle(self, *arguments, **keywords):
        steps["optimizer"] += 1
        if steps["optimizer"] == 3:
            for group in self.param_groups:  # half of it is done
                for parameter in group["params"]:
                    parameter.data.add_(1)
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    kind = torch.optim.SGD if "optimizer" in settings else torch.optim.Adam
    original = kind.step
    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            run(packed, steps=5, learning_rate=0.1, checkpoint_dir=tmp_path, **settings)
    heads = tiny.make_heads()

    def in_a_pass(module, batch, task):
        steps["passes"] += torch.is_grad_enabled()
        torch.rand(1)  # moves torch's random state
        if steps["passes"] == 9:
            raise KeyboardInterrupt
        return module(batch) @ heads[task]

    with pytest.raises(KeyboardInterrupt):
        run(packed, steps=5, learning_rate=0.1, checkpoint_dir=tmp_path, logits=in_a_pass, **settings)
    history = torch.load(io.BytesIO(read_sealed(tmp_path / "state.pt")))["history"]
    assert history == whole.history[: len(history)] and len(history) == 3
    with monkeypatch.context() as patch:
        patch.setattr("samerge_ext.learning.run_state.write_sealed", interrupt_once(write_sealed))
        with pytest.raises(KeyboardInterrupt):
            run(packed, steps=4, learning_rate=0.1, checkpoint_dir=tmp_path, **settings)
    goes_on = run(packed, steps=5, learning_rate=0.1, checkpoint_dir=tmp_path, **settings)
    assert torch.equal(goes_on.coefficients, whole.coefficients)


def interrupt_once(function):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_a_checkpoint_of_another_run_is_refused(packed, tmp_path):
    run(packed, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"state.pt is of another run: rho differ"):
        run(packed, checkpoint_dir=tmp_path, rho=0.2)
    with pytest.raises(ValueError, match="6 steps in, past the 2 asked for"):
        run(packed, checkpoint_dir=tmp_path, steps=2)


def test_a_checkpoint_of_weights_that_have_changed_is_refused(packed, tmp_path):
    first, later = ({"expert/": {"model.safetensors": [100, time]}} for time in (1, 2))
    run(replace(packed, inputs=first), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="state.pt is of another run: weight files differ"):
        run(replace(packed, inputs=later), checkpoint_dir=tmp_path)


def test_runs_repeat_bit_for_bit(packed):
    assert torch.equal(run(packed).coefficients, run(packed).coefficients)


def test_a_result_holds_no_gradients(packed):
    result = run(packed)
    assert all(parameter.grad is None for parameter in result.module.parameters())


def test_history_holds_losses_per_task_and_the_gradient_norm(packed):
    history = run(packed, task_weights={"red": 2.0}).history
    assert [record["step"] for record in history] == list(range(6))
    first = history[0]
    assert first["loss"] == pytest.approx(2 * first["losses"]["red"] + first["losses"]["green"] + first["losses"]["blue"])
    assert first["gradient_norm"] > 0


def test_an_epoch_is_as_long_as_the_longest_task_and_others_cycle():
    calibration = Calibration({"a": "xyz", "b": "uv"}, ("a", "b"))
    assert calibration.steps_per_epoch == 3
    assert [tuple(calibration.at(step).values()) for step in range(5)] == [(0, 0), (1, 1), (2, 0), (0, 0), (1, 1)]


def test_shuffling_visits_every_batch_once_an_epoch_in_an_order_of_the_seed():
    def orders(seed):
        calibration = Calibration({"a": range(20)}, ("a",), shuffle=True, seed=seed)
        return [[calibration.at(step)["a"] for step in range(20 * epoch, 20 * epoch + 20)] for epoch in range(2)]

    first, second = orders(0)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert orders(0) == [first, second] and orders(1) != [first, second]


@pytest.mark.parametrize("method", [sm.adamerging, sm.statsmerging])
def test_every_method_can_hold_batches_back(packed, method):
    """The state with the least loss is the result: that of a run which ends there."""
    config = {sm.adamerging: sm.AdaMergingConfig, sm.statsmerging: sm.StatsMergingConfig}[method]
    settings = {"method": method, "config": config, "learning_rate": 0.3, "steps": 40}
    if method is sm.statsmerging:
        settings |= {"learning_rate_decay": 1.0, "learning_rate": 0.02}
    result = run(packed, held_back=0.4, measure_every=1, patience=3, **settings)
    losses = [record["held_back_loss"] for record in result.history]
    assert len(losses) < 40 and min(losses) < losses[-1]
    best = losses.index(min(losses))
    batches = {task: [held[0], held[2]] for task, held in tiny.make_batches().items()}
    shorter = run(packed, batches=batches, **{**settings, "steps": best})
    assert torch.equal(result.coefficients, shorter.coefficients)


def test_a_generator_of_batches_is_materialised_once(packed):
    batches = tiny.make_batches()
    generated = {task: (batch for batch in held) for task, held in batches.items()}
    assert torch.equal(run(packed, batches=generated).coefficients, run(packed, batches=batches).coefficients)


def test_an_empty_calibration_set_is_refused(packed):
    with pytest.raises(ValueError, match="calibration set of task 'green' is empty"):
        run(packed, batches=tiny.make_batches() | {"green": []})


def test_calibration_for_other_tasks_is_refused(packed):
    with pytest.raises(ValueError, match=r"add batches for \['green'\]"):
        run(packed, batches={t: b for t, b in tiny.make_batches().items() if t != "green"})
    with pytest.raises(ValueError, match=r"remove \['pink'\]"):
        run(packed, batches=tiny.make_batches() | {"pink": [torch.zeros(1, 8)]})


def test_a_batch_that_the_model_refuses_is_named(packed):
    batches = tiny.make_batches() | {"green": [torch.zeros(2, 3, dtype=torch.float64)]}
    with pytest.raises(RuntimeError) as error:
        run(packed, batches=batches)
    assert any("the batch of task 'green'" in note for note in error.value.__notes__)


def test_logits_that_are_no_matrix_are_refused(packed):
    with pytest.raises(TypeError, match=r"logits of task 'red' are a tensor \[6\]; expected a tensor \[batch, classes\]"):
        run(packed, logits=lambda module, batch, task: module(batch)[:, 0])


def test_logits_without_a_gradient_are_refused(packed):
    with pytest.raises(RuntimeError, match="logits of task 'red' carry no gradient"):
        run(packed, logits=lambda module, batch, task: module(batch).detach())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_task_and_step(packed, value):
    calls = 0
    heads = tiny.make_heads()

    def logits(module, batch, task):
        nonlocal calls
        calls += torch.is_grad_enabled() and task == "green"
        bad = calls > 3 and task == "green" and torch.is_grad_enabled()
        return module(batch) @ heads[task] * (value if bad else 1.0)

    with pytest.raises(FloatingPointError, match="the loss of task 'green' is nan at step 3"):
        run(packed, logits=logits, sam="off")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sam", "sharp"),
        ("granularity", "row"),
        ("rho", -1.0),
        ("learning_rate", float("nan")),
        ("steps", 0),
        ("temperature", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        sm.SAMergingConfig(**{setting: value})


def test_task_weights_of_an_unknown_task_are_refused(packed):
    with pytest.raises(ValueError, match=r"task_weights names \['pink'\]"):
        run(packed, task_weights={"pink": 1.0})


def test_bf16_autocast_stays_close_to_fp32():
    base = tiny.make(0, torch.float32)
    packed = sm.PackedWeights.from_modules(base, tiny.make_experts(base))
    heads, batches = tiny.make_heads(torch.float32), tiny.make_batches(dtype=torch.float32)
    results = [
        sm.samerging(
            tiny.make(1, torch.float32),
            packed,
            batches,
            tiny.shared_encoder(heads),
            config=sm.SAMergingConfig(steps=10, learning_rate=0.01, precision=precision, progress=False),
        ).coefficients
        for precision in ("fp32", "bf16")
    ]
    moved = (results[0] - 0.3).norm()
    assert 0 < (results[0] - results[1]).norm() < 0.2 * moved
