"""What a torch optimizer promises of its state: saved, loaded, copied, hooked, extended."""

import copy
import io
import pickle
from itertools import islice

import pytest
import torch
from optimizer_db import MOMENTUM_INFOS, OPTIM_DB, SCALE_INFO, Tiny, build, configurations, train
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optims
from torch.testing._internal.common_utils import TestCase, parametrize

from optimzoo import SCALE, describe, param_groups

# A method's options in parts, one of which `make test` takes. Odd: every second has foreach on.
PARTS = 3
in_parts = parametrize("part", range(PARTS))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def through_a_file(obj, device="cpu"):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location=device)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def public(optimizer):
    return {k: v for k, v in vars(optimizer).items() if not k.startswith("_")}


class TestState(TestCase):
    def assert_bits(self, actual, expected, message=None):
        """Equal values, dtypes, devices, keys."""
        self.assertEqual(actual, expected, message, atol=0, rtol=0, exact_dtype=True)

    def assert_same_future(self, pairs, message=None):
        """Train each (model, optimizer) further: the weights stay equal, bit for bit."""
        for model, optimizer in pairs:
            train(model, optimizer, 3)
        first, second = ([p.detach() for p in model.parameters()] for model, _ in pairs)
        self.assert_bits(second, first, message)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB, dtypes=DTYPES)
    def test_round_trip_is_exact(self, device, dtype, optim_info, part):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            model = Tiny(device, dtype)
            optimizer = build(optim_info, model, **copy.deepcopy(kwargs))
            self.assertEqual(len(optimizer.state), 0)
            train(model, optimizer, 3)
            saved = through_a_file({"m": model.state_dict(), "o": optimizer.state_dict()}, device)
            self.assert_bits(saved["o"]["state"], optimizer.state_dict()["state"], desc)

            again = Tiny(device, dtype, seed=1)
            again.ids, again.labels = model.ids, model.labels
            restored = build(optim_info, again, **copy.deepcopy(kwargs))
            again.load_state_dict(saved["m"])
            restored.load_state_dict(saved["o"])
            self.assert_bits(restored.state_dict(), optimizer.state_dict(), desc)
            self.assert_same_future([(model, optimizer), (again, restored)], desc)
            self.assert_bits(restored.state_dict(), optimizer.state_dict(), desc)

    @optims(OPTIM_DB)
    def test_a_state_from_before_the_first_step(self, device, dtype, optim_info):
        models = [Tiny(device, dtype) for _ in range(2)]
        first, second = (build(optim_info, m) for m in models)
        second.load_state_dict(through_a_file(first.state_dict()))
        self.assert_same_future([(models[0], first), (models[1], second)])

    @optims(OPTIM_DB)
    def test_a_state_mapped_to_the_cpu_returns_to_the_device(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        train(model, optimizer, 2)
        restored = build(optim_info, model)
        restored.load_state_dict(through_a_file(optimizer.state_dict(), "cpu"))
        for param in model.parameters():
            for key, value in optimizer.state.get(param, {}).items():
                self.assertEqual(restored.state[param][key].device, value.device, key)

    @pytest.mark.each_method
    @in_parts
    @optims(OPTIM_DB)
    def test_an_older_state_lacks_options(self, device, dtype, optim_info, part):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        train(model, optimizer, 2)
        twin = copy.deepcopy(model)
        whole = build(optim_info, twin)
        whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(twin, whole, 3)
        options = {key for group in optimizer.param_groups for key in group} - {"params"}
        for missing in sorted(options)[part::PARTS]:
            state = copy.deepcopy(optimizer.state_dict())
            for group in state["param_groups"]:
                group.pop(missing, None)
            untouched = copy.deepcopy(state)
            other = copy.deepcopy(model)
            restored = build(optim_info, other)
            restored.load_state_dict(state)
            self.assertEqual(state, untouched, missing)
            self.assertEqual(describe(restored), describe(optimizer), missing)
            train(other, restored, 3)
            self.assert_bits(list(other.parameters()), list(twin.parameters()), missing)

    @optims(OPTIM_DB)
    def test_step_counts_may_come_as_numbers(self, device, dtype, optim_info):
        for kind in (float, int):
            model = Tiny(device, dtype)
            optimizer = build(optim_info, model)
            train(model, optimizer, 2)
            state = copy.deepcopy(optimizer.state_dict())
            for entry in state["state"].values():
                if "step" in entry:
                    entry["step"] = kind(entry["step"])
            twin = copy.deepcopy(model)
            restored = build(optim_info, twin)
            restored.load_state_dict(state)
            self.assert_same_future([(model, optimizer), (twin, restored)])

    @pytest.mark.each_method
    @parametrize("saved_names", [False, True])
    @parametrize("own_names", [False, True])
    @optims(OPTIM_DB)
    def test_named_and_unnamed_states_load(self, device, dtype, optim_info, saved_names, own_names):
        def make(model, named):
            return optim_info.optim_cls(model.named_parameters() if named else model.parameters())

        model = Tiny(device, dtype)
        optimizer = make(model, saved_names)
        train(model, optimizer, 2)
        twin = copy.deepcopy(model)
        restored = make(twin, own_names)
        restored.load_state_dict(through_a_file(optimizer.state_dict(), device))
        self.assert_same_future([(model, optimizer), (twin, restored)])
        names = [name for group in restored.param_groups for name in group.get("param_names", [])]
        expected = {n for n, _ in model.named_parameters()} if saved_names or own_names else set()
        self.assertEqual(set(names), expected)

    @optims(OPTIM_DB)
    def test_refuses_groups_that_do_not_fit(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        train(model, optimizer, 1)
        state = optimizer.state_dict()
        before = copy.deepcopy(state)

        def refused(change, regex):
            wrong = copy.deepcopy(state)
            change(wrong["param_groups"])
            with self.assertRaisesRegex(ValueError, regex) as caught:
                optimizer.load_state_dict(wrong)
            self.assertNotIn("\n", str(caught.exception))
            self.assert_bits(optimizer.state_dict(), before)

        roles = [group["role"] for group in state["param_groups"]]
        self.assertEqual(roles, ["hidden", "embedding", "head", "vector"])
        refused(lambda groups: groups.pop(), "different number of parameter groups")
        refused(lambda groups: groups[3]["params"].append(9), "match the size of optimizer's group")
        refused(
            lambda groups: groups[1].update(role="head"),
            "state's group 1 has the role 'head' and this optimizer's has 'embedding'",
        )
        optimizer.load_state_dict(state)

    @pytest.mark.each_method
    @in_parts
    @parametrize("clone", [copy.deepcopy, pickled], name_fn=lambda clone: clone.__name__)
    @optims(OPTIM_DB)
    def test_copies_and_pickles_are_complete_and_separate(
        self, device, dtype, optim_info, part, clone
    ):
        for desc, kwargs in islice(configurations(optim_info, device), part, None, PARTS):
            model = Tiny(device, dtype)
            optimizer = build(optim_info, model, **copy.deepcopy(kwargs))
            train(model, optimizer, 2)
            twin, restored = clone((model, optimizer))
            self.assertEqual(public(restored).keys(), public(optimizer).keys())
            self.assert_bits(restored.state_dict(), optimizer.state_dict(), desc)
            before = copy.deepcopy(restored.state_dict())
            train(model, optimizer, 3)
            self.assert_bits(restored.state_dict(), before, desc)
            train(twin, restored, 3)
            self.assert_bits(list(twin.parameters()), list(model.parameters()), desc)
            extra = {"params": [nn.Parameter(torch.ones(2, 3, device=device))], "role": "head"}
            restored.add_param_group({**extra, "param_names": ["extra"]})
            self.assertEqual(len(restored.param_groups), len(optimizer.param_groups) + 1)

    @optims(OPTIM_DB)
    def test_prints_its_groups(self, device, dtype, optim_info):
        text = repr(build(optim_info, Tiny(device, dtype), lr=0.125))
        self.assertTrue(text.startswith(f"{optim_info.name} ("))
        for word in ("hidden", "embedding", "head", "vector", "lr: 0.125"):
            self.assertIn(word, text)

    @optims(OPTIM_DB)
    def test_step_hooks_run_around_the_step_until_removed(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        calls = []

        def record(name):
            return lambda opt, args, kwargs: calls.append(
                (name, opt is optimizer, model.lm_head.weight[0, 0].item())
            )

        handles = [
            optimizer.register_step_pre_hook(record("pre")),
            optimizer.register_step_post_hook(record("post")),
        ]
        before = model.lm_head.weight[0, 0].item()
        train(model, optimizer, 1)
        after = model.lm_head.weight[0, 0].item()
        self.assertNotEqual(before, after)
        self.assertEqual(calls, [("pre", True, before), ("post", True, after)])
        for handle in handles:
            handle.remove()
        train(model, optimizer, 1)
        self.assertEqual(len(calls), 2)

    @optims(OPTIM_DB)
    def test_state_hooks_may_keep_strings_in_the_state(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        calls = []

        def before_saving(opt):
            opt.state["note"] = torch.tensor([7])
            opt.state["text"] = "kept"

        def after_saving(opt, state):
            return {**state, "version": 2}

        def before_loading(opt, state):
            self.assertEqual(state["version"], 2)
            return {**state, "state": {**state["state"], "renamed": "too"}}

        def after_loading(opt):
            calls.append(opt.state["renamed"])
            opt.state[model.lm_head.weight]["extra"] = 1.5

        optimizer.register_state_dict_pre_hook(before_saving)
        optimizer.register_state_dict_post_hook(after_saving)
        optimizer.register_load_state_dict_pre_hook(before_loading)
        optimizer.register_load_state_dict_post_hook(after_loading)
        train(model, optimizer, 2)
        state = through_a_file(optimizer.state_dict(), device)
        self.assertEqual(state["state"]["text"], "kept")
        optimizer.load_state_dict(state)
        self.assertEqual(calls, ["too"])
        train(model, optimizer, 2)
        self.assertEqual(optimizer.state["text"], "kept")
        self.assertEqual(optimizer.state["note"], torch.tensor([7]))
        self.assertEqual(optimizer.state[model.lm_head.weight]["extra"], 1.5)

    @optims([SCALE_INFO], dtypes=[torch.bfloat16])
    def test_a_hook_after_loading_sees_the_saved_dtype_and_has_the_last_word(
        self, device, dtype, optim_info
    ):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        train(model, optimizer, 2)
        bias = model.hidden.bias
        seen = []

        def narrow(opt):
            seen.append(opt.state[bias]["exp_avg_sq"].dtype)
            opt.state[bias]["exp_avg_sq"] = opt.state[bias]["exp_avg_sq"].half()

        optimizer.register_load_state_dict_post_hook(narrow)
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(seen, [torch.float32])
        self.assertEqual(optimizer.state[bias]["exp_avg_sq"].dtype, torch.float16)

    def test_scale_keeps_its_dtypes_under_bfloat16_weights(self, device):
        wide, narrow = Tiny(device), Tiny(device, torch.bfloat16)
        source, target = (SCALE(param_groups(m), lr=2**-5) for m in (wide, narrow))
        train(wide, source, 3)
        train(narrow, target, 3)
        own = {k: v.dtype for k, v in target.state[narrow.hidden.bias].items()}
        self.assertEqual(own["exp_avg"], torch.float32)
        self.assertEqual(own["exp_avg_sq"], torch.float32)
        self.assertEqual(target.state[narrow.lm_head.weight]["exp_avg"].dtype, torch.bfloat16)

        moments = target.state[narrow.hidden.bias]["exp_avg_sq"].clone()
        target.load_state_dict(through_a_file(target.state_dict(), device))
        self.assert_bits(target.state[narrow.hidden.bias]["exp_avg_sq"], moments)
        self.assertNotEqual(moments, moments.bfloat16().float(), atol=0, rtol=0)

        target.load_state_dict(through_a_file(source.state_dict(), device))
        kept = target.state[narrow.lm_head.weight]["exp_avg"]
        self.assert_bits(kept, source.state[wide.lm_head.weight]["exp_avg"])
        losses = train(narrow, target, 6)
        self.assertLess(losses[-1], losses[0])
        self.assertEqual(target.state[narrow.lm_head.weight]["exp_avg"].dtype, torch.float32)

    @optims(OPTIM_DB)
    def test_a_loaded_optimizer_follows_its_groups(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        optimizer = build(optim_info, model)
        train(model, optimizer, 2)
        optimizer.load_state_dict(through_a_file(optimizer.state_dict(), device))
        scheduler = LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
        train(model, optimizer, 1, [scheduler])
        self.assertEqual({group["lr"] for group in optimizer.param_groups}, {0.0})
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1)
        self.assert_bits([p.detach() for p in model.parameters()], before)

    @parametrize("loaded", [False, True])
    def test_a_scheduler_scales_vector_lr_and_lr_alike(self, device, loaded):
        model = Tiny(device)
        optimizer = SCALE(param_groups(model), lr=2**-8, vector_lr=2**-4)
        if loaded:
            optimizer.load_state_dict(through_a_file(optimizer.state_dict(), device))
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
        rates = {"hidden": 2**-8, "embedding": 2**-8, "head": 2**-8, "vector": 2**-4}
        for step in range(4):
            now = {group["role"]: group["lr"] for group in optimizer.param_groups}
            self.assertEqual(now, {k: v * 0.5**step for k, v in rates.items()}, atol=0, rtol=0)
            train(model, optimizer, 1, [scheduler])

    @optims(OPTIM_DB)
    def test_groups_may_be_added(self, device, dtype, optim_info):
        model = Tiny(device, dtype)
        groups = param_groups(model)
        given = [dict(group) for group in groups]
        optimizer = optim_info.optim_cls(groups[:2])
        train(model, optimizer, 2)
        for group in groups[2:]:
            optimizer.add_param_group(group)
        self.assertEqual([group.keys() for group in groups], [group.keys() for group in given])
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1)
        for param, old in zip(model.parameters(), before, strict=True):
            self.assertNotEqual(param.detach(), old)

        matrix = nn.Parameter(torch.ones(2, 3, device=device))
        vector = nn.Parameter(torch.ones(3, device=device))
        cube = nn.Parameter(torch.ones(2, 3, 4, device=device))
        refused = [
            ([matrix], TypeError, "must be a dict"),
            ({"params": [vector], "role": "head"}, ValueError, "needs two dimensions"),
            ({"params": [matrix], "role": "tail"}, ValueError, "unknown role 'tail'"),
            ({"params": [model.hidden.bias], "role": "vector"}, ValueError, "more than one"),
        ]
        if optim_info in MOMENTUM_INFOS:
            stack = {"params": [cube], "role": "hidden", "stacked": True, "heads": 2}
            refused.append((stack, ValueError, "Invalid heads: 2; it must divide the 3 rows"))
        for group, error, regex in refused:
            if isinstance(group, dict):
                group["param_names"] = ["extra"]
            with self.assertRaisesRegex(error, regex):
                optimizer.add_param_group(group)
            self.assertEqual(len(optimizer.param_groups), 4, regex)
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer, 1)


instantiate_device_type_tests(TestState, globals(), only_for=("cpu", "cuda"))
