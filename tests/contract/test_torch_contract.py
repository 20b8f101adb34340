"""What a torch optimizer promises of its step, over the records of `optimizer_db`."""

import copy
import warnings
from itertools import islice

import pytest
import torch
from optimizer_db import (
    LR,
    OPTIM_DB,
    SCHEDULERS,
    ZOO,
    Tiny,
    build,
    configurations,
    train,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, TensorTracker, optims
from torch.testing._internal.common_utils import TestCase, parametrize

from optimzoo import SCALE, APOLLOMini, param_groups

# A method's options in parts, one of which `make test` takes. Odd: every second has foreach on.
PARTS = 3
in_parts = parametrize("part", range(PARTS))
STATE_KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")
# Every shape that a layer has, and those that none has.
SHAPES = [(7, 5), (5, 7), (1, 6), (6, 1), (4, 3, 2, 5), (3, 5, 2), (9,), (1,), ()]
EMPTY = [(0, 5), (5, 0), (0,)]


def parameters(shapes, device, dtype, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(x.to(device, dtype)) for x in draw]


def draw_grads(params, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = draw.to(p.device, p.dtype)


def values(params):
    return [p.detach().clone() for p in params]


class TestStep(TestCase):
    def assert_same_run(self, runs, *, steps=5, **tolerance):
        """Each of `runs` is (model, optimizer); the runs agree in weights and state, each step."""
        tracker = TensorTracker(tolerance)
        for run, (model, optimizer) in enumerate(runs):
            for _ in range(steps):
                train(model, optimizer, 1)
                states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
                tensors = [*model.parameters()]
                tensors += [s[key] for s in states for key in STATE_KEYS if key in s]
                for tensor in tensors:
                    if run == 0:
                        tracker.add(tensor)
                    else:
                        tracker.pop_check_set(tensor.detach(), self)
        self.assertTrue(tracker.all_popped())

    @optims(OPTIM_DB)
    def test_refuses_in_one_line(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            entry = error.optimizer_error_input
            params = entry.params
            if params is None:
                params = parameters([(3, 2), (2,)], device, dtype)
            expected = (error.error_type, error.error_regex)
            if issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(*expected):
                    optim_info.optim_cls(params, **entry.kwargs)
            elif error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
                with self.assertRaisesRegex(*expected) as caught:
                    optim_info.optim_cls(params, **entry.kwargs)
                self.assertNotIn("\n", str(caught.exception))
            else:
                optimizer = optim_info.optim_cls(params, **entry.kwargs)
                with self.assertRaisesRegex(*expected) as caught:
                    optimizer.step()
                self.assertNotIn("\n", str(caught.exception))

    @pytest.mark.each_method
    @parametrize("contiguous", [True, False])
    @parametrize("schedule", range(len(SCHEDULERS)))
    @optims(OPTIM_DB)
    def test_goes_in_the_right_direction(self, device, dtype, optim_info, contiguous, schedule):
        for desc, kwargs in configurations(optim_info, device):
            model = Tiny(device, dtype, contiguous=contiguous)
            optimizer = build(optim_info, model, **copy.deepcopy(kwargs))
            schedulers = [make(optimizer) for make in optim_info.scheduler_inputs[schedule]]
            losses = train(model, optimizer, 6, schedulers)
            climbs = kwargs.get("maximize", False)
            self.assertEqual(losses[-1] > losses[0], climbs, f"{desc}: {losses}")

    @optims(OPTIM_DB)
    def test_groups_have_their_own_learning_rate_and_schedule(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        groups = param_groups(model)
        rates = {"hidden": 2**-6, "embedding": 2**-7, "head": 0.0, "vector": 2**-8}
        for group in groups:
            group["lr"] = rates[group["role"]]
        optimizer = optim_info.optim_cls(groups)
        schedulers = [LinearLR(optimizer, 0.5, total_iters=2), CosineAnnealingLR(optimizer, 9)]
        head = model.lm_head.weight.detach().clone()
        losses = train(model, optimizer, 6, schedulers)
        self.assertLess(losses[-1], losses[0])
        self.assertEqual(model.lm_head.weight, head, atol=0, rtol=0)
        factors = {
            group["lr"] / rates[group["role"]]
            for group in optimizer.param_groups
            if group["role"] != "head"
        }
        self.assertEqual(max(factors), min(factors))
        self.assertLess(max(factors), 1.0)

    @pytest.mark.each_method
    @in_parts
    @parametrize("dimensions", [0, 1])
    @optims(OPTIM_DB, dtypes=[torch.float64])
    def test_tensor_lr_equals_float_lr(self, device, dtype, optim_info, part, dimensions):
        lr = torch.tensor([LR], device=device) if dimensions else torch.tensor(LR)
        for _, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            if "lr" in kwargs or "vector_lr" in kwargs:
                continue
            runs = []
            for rate in (LR, lr.clone()):
                model = Tiny(device, dtype)
                runs.append((model, build(optim_info, model, lr=rate, **copy.deepcopy(kwargs))))
            # torch's AdamW takes its step size in the tensor's own float32.
            self.assert_same_run(runs, atol=1e-9, rtol=1e-7)

    @pytest.mark.each_method
    @in_parts
    @optims([i for i in OPTIM_DB if "foreach" in i.supported_impls], dtypes=[torch.float64])
    def test_foreach_equals_the_loop(self, device, dtype, optim_info, part):
        for entry in islice(optim_info.optim_inputs_func(device), part, None, PARTS):
            runs = []
            for foreach in (False, True):
                model = Tiny(device, dtype)
                kwargs = {**copy.deepcopy(entry.kwargs), "foreach": foreach}
                runs.append((model, build(optim_info, model, **kwargs)))
            self.assert_same_run(runs, atol=1e-12, rtol=1e-10)
            bare = []
            for foreach in (False, True):
                params = parameters(SHAPES + EMPTY, device, dtype)
                if "vector_lr" in entry.kwargs:
                    continue
                kwargs = {**copy.deepcopy(entry.kwargs), "foreach": foreach}
                optimizer = optim_info.optim_cls(params, **kwargs)
                for step in range(3):
                    draw_grads(params, seed=step)
                    optimizer.step()
                bare.append(params)
            if bare:
                self.assertEqual(bare[1], bare[0], atol=1e-12, rtol=1e-10)

    # torch's own optimizers refuse capturable=True on the CPU; ours has no need to.
    @optims([i for i in OPTIM_DB if i.has_capturable_arg], dtypes=[torch.float64])
    def test_capturable_equals_not_capturable(self, device, dtype, optim_info):
        for _, kwargs in configurations(optim_info, device, flag="capturable"):
            runs = []
            for capturable in (False, True):
                model = Tiny(device, dtype)
                options = {**copy.deepcopy(kwargs), "capturable": capturable}
                runs.append((model, build(optim_info, model, **options)))
            # Captured, the bias correction is taken from the float32 step count, on the device.
            self.assert_same_run(runs, atol=1e-6, rtol=1e-6)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_follows_a_default_dtype_of_float64(self, device, dtype, optim_info, part):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
                model = Tiny(device, torch.float64)
                optimizer = build(optim_info, model, **kwargs)
                train(model, optimizer, 2)
                for state in optimizer.state.values():
                    kinds = {v.dtype for v in state.values() if v.is_floating_point()}
                    expected = {torch.float64}
                    if kwargs.get("history_dtype"):
                        expected.add(getattr(torch, kwargs["history_dtype"]))
                    self.assertLessEqual(kinds, expected, desc)
        finally:
            torch.set_default_dtype(before)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_zero_gradients_move_nothing(self, device, dtype, optim_info, part):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            if "vector_lr" in kwargs:
                continue
            params = parameters(SHAPES + EMPTY, device, dtype)
            kwargs = {k: v for k, v in kwargs.items() if "weight_decay" not in k}
            optimizer = optim_info.optim_cls(params, **kwargs)
            before = values(params)
            for _ in range(2):
                for p in params:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
            self.assertEqual(values(params), before, desc, atol=0, rtol=0)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_absent_gradients_move_nothing_and_make_no_state(self, device, dtype, optim_info, part):
        for _, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            model = Tiny(device, dtype)
            optimizer = build(optim_info, model, **kwargs)
            before = values(model.parameters())
            optimizer.step()
            self.assertEqual(values(model.parameters()), before, atol=0, rtol=0)
            self.assertEqual(len(optimizer.state), 0)
            train(model, optimizer, 2)
            before, state = values(model.parameters()), copy.deepcopy(optimizer.state_dict())
            optimizer.zero_grad()
            optimizer.step()
            self.assertEqual(values(model.parameters()), before, atol=0, rtol=0)
            self.assertEqual(optimizer.state_dict()["state"], state["state"], atol=0, rtol=0)

    @optims(OPTIM_DB, dtypes=[torch.float64])
    def test_weight_decay_is_decoupled_and_per_group(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        groups = param_groups(model)
        for i, group in enumerate(groups):
            style = ("decoupled", "cautious")[i % 2]  # a weight that is not moved decays by both
            group.update(lr=0.5, weight_decay=i / 10, weight_decay_style=style)
        optimizer = optim_info.optim_cls(groups)
        before = [values(group["params"]) for group in groups]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for i, (group, old) in enumerate(zip(groups, before, strict=True)):
            self.assertEqual(group["params"], [x * (1 - 0.5 * i / 10) for x in old])

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB, dtypes=[torch.float64])
    def test_maximize_is_descent_on_the_negative(self, device, dtype, optim_info, part):
        for _, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            kwargs.pop("maximize", None)
            results = []
            for maximize in (False, True):
                model = Tiny(device, dtype)
                optimizer = build(optim_info, model, maximize=maximize, **copy.deepcopy(kwargs))
                for step in range(3):
                    draw_grads(model.parameters(), seed=step)
                    if maximize:
                        for p in model.parameters():
                            p.grad.neg_()
                    optimizer.step()
                results.append(values(model.parameters()))
            self.assertEqual(results[1], results[0], atol=0, rtol=0)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB, dtypes=[torch.float64])
    def test_layout_in_memory_does_not_matter(self, device, dtype, optim_info, part):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            if "vector_lr" in kwargs:
                continue
            results = []
            for spread in (False, True):
                params = parameters(SHAPES + EMPTY, device, dtype)
                if spread:
                    params = [nn.Parameter(torch.stack([p.data] * 2, -1)[..., 0]) for p in params]
                optimizer = optim_info.optim_cls(params, **copy.deepcopy(kwargs))
                for step in range(3):
                    draw_grads(params, seed=step)
                    for p in params if spread else []:
                        p.grad = p.grad.mT.contiguous().mT if p.ndim >= 2 else p.grad
                        p.grad = torch.stack([p.grad] * 2, -1)[..., 1] if step else p.grad
                    optimizer.step()
                results.append([x.contiguous() for x in values(params)])
            self.assertEqual(results[1], results[0], desc, atol=1e-12, rtol=1e-10)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_every_shape_moves_and_stays_finite(self, device, dtype, optim_info, part):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            if "vector_lr" in kwargs:
                continue
            params = parameters(SHAPES + EMPTY, device, dtype)
            before = values(params)
            optimizer = optim_info.optim_cls(params, **kwargs)
            draw_grads(params)
            optimizer.step()
            for p, old in zip(params, before, strict=True):
                self.assertTrue(p.isfinite().all(), f"{desc} {tuple(p.shape)}")
                self.assertEqual(p.shape, old.shape)
                # A low-rank step may leave an entry where it is.
                allowed = p.numel() // 20 if optim_info in ZOO else 0
                still = (p == old).sum().item()
                self.assertLessEqual(still, allowed, f"{desc} {tuple(p.shape)}")

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_one_group_may_mix_dtypes_and_devices(self, device, dtype, optim_info, part):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            if "vector_lr" in kwargs or kwargs.get("capturable"):
                continue
            kinds = [(device, torch.float32), (device, torch.bfloat16), ("cpu", torch.float64)]
            params = [p for kind in kinds for p in parameters([(7, 5), (5,)], *kind)]
            lr = kwargs.get("lr")
            if isinstance(lr, torch.Tensor):
                kwargs["lr"] = lr.cpu().reshape(())
            optimizer = optim_info.optim_cls(params, **kwargs)
            before = values(params)
            for step in range(3):
                for pair in (params[:2], params[2:4], params[4:]):
                    draw_grads(pair, seed=step)
                optimizer.step()
            exact, rounded = params[4:], params[2:4]
            for wide, narrow, old in zip(exact, rounded, before[4:], strict=True):
                self.assertNotEqual(wide, old)
                narrow = narrow.to("cpu", torch.float64)
                self.assertTrue(narrow.isfinite().all())
                # Each parameter has sketches of its own, which matter where the rank is small.
                if "rank" not in kwargs and optim_info.optim_cls is not APOLLOMini:
                    self.assertEqual(narrow, wide, desc, atol=0.02, rtol=0.02)
            self.assertEqual([p.dtype for p in params[::2]], [dtype for _, dtype in kinds])

    @optims(OPTIM_DB)
    def test_closure(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        grad_modes = []

        def closure():
            grad_modes.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            return loss

        before = model().item()
        with torch.no_grad():
            loss = optimizer.step(closure)
        self.assertEqual(loss.item(), before)
        self.assertEqual(grad_modes, [True])
        self.assertLess(model().item(), before)
        self.assertIsNone(optimizer.step())

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB, dtypes=[torch.float32, torch.bfloat16])
    def test_grad_scaler_skips_a_step_with_infinities(self, device, dtype, optim_info, part):
        kind = torch.device(device).type
        if (kind, dtype) == ("cuda", torch.bfloat16):
            self.skipTest("torch unscales no bfloat16 gradients on a GPU")
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            model = Tiny(device, dtype)
            optimizer = build(optim_info, model, **kwargs)
            scaler = torch.amp.GradScaler(kind, init_scale=8.0)
            train(model, optimizer, 1)
            before, state = values(model.parameters()), copy.deepcopy(optimizer.state_dict())
            for bad in (float("inf"), float("nan"), None):
                optimizer.zero_grad()
                scaler.scale(model()).backward()
                if bad is not None:
                    model.hidden.weight.grad[1, 2] = bad
                scaler.step(optimizer)
                scaler.update()
                if bad is not None:
                    self.assertEqual(values(model.parameters()), before, desc, atol=0, rtol=0)
                    now = optimizer.state_dict()["state"]
                    self.assertEqual(now, state["state"], desc, atol=0, rtol=0)
            self.assertNotEqual(values(model.parameters()), before)
            self.assertTrue(all(p.isfinite().all() for p in model.parameters()))

    @parametrize("foreach", [False, True])
    def test_scale_keeps_a_nan_to_the_line_it_came_in(self, device, foreach):
        model = Tiny(device)
        optimizer = SCALE(param_groups(model), foreach=foreach)
        draw_grads(model.parameters())
        for p in model.parameters():
            p.grad[(1, 3)[: p.ndim]] = float("nan")
        optimizer.step()
        ruined = {name: p.isnan().nonzero().T for name, p in model.named_parameters()}
        self.assertEqual(set(ruined["hidden.weight"][0].tolist()), {1})
        self.assertEqual(set(ruined["lm_head.weight"][0].tolist()), {1})
        self.assertEqual(set(ruined["embed.weight"][1].tolist()), {3})
        self.assertEqual(ruined["hidden.bias"].tolist(), [[1]])

    def test_bare_parameters_warn_once(self, device):
        params = parameters([(3, 2), (2,), (2, 3)], device, torch.float32)
        for info in OPTIM_DB:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer = info.optim_cls(params[:2])
                optimizer.add_param_group({"params": params[2:]})
                info.optim_cls(param_groups(Tiny(device)))
            self.assertEqual(len(caught), 1)
            self.assertIn("was given bare parameters", str(caught[0].message))


instantiate_device_type_tests(TestStep, globals(), only_for=("cpu", "cuda"))
