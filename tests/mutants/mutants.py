"""Small faults to plant in the package, each of which a test has to find.

`python -m tests.mutants` prints the test that kills each one. To add a mutant, append a row: a text
that occurs once in its module, and a plausible mistake to put in its place.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault that is planted in the package."""

    module: str
    """Its path in `lightning_adam`, without .py."""
    text: str
    """What is replaced; it occurs once."""
    replacement: str
    meaning: str
    """What goes wrong, in a few words."""


REDUNDANT = frozenset({15, 20, 32})
"""Mutants of lines that guard against what cannot happen today. No test can kill them."""

MUTANTS = (
    Mutant(
        "optim/steps",
        "return (steps // interval + 1) * interval if steps else 1",
        "return (steps // interval + 1) * interval",
        "the first measurement waits for a whole interval",
    ),
    Mutant(
        "optim/steps",
        "        self.skipped += self._is_expected\n        self._is_expected = True",
        "        self._is_expected = True",
        "an expected step that never came is not counted as skipped",
    ),
    Mutant(
        "optim/steps",
        "        self._depth = 0\n\n    def settle",
        "        pass\n\n    def settle",
        "a step that raised leaves the nesting depth of steps too large",
    ),
    Mutant(
        "optim/steps",
        "self.flags = self.flag if self.flags is None else self.flags + self.flag",
        "self.flags = self.flag",
        "flags of earlier steps that the device skipped are forgotten",
    ),
    Mutant(
        "optim/steps",
        "self.flags + (self.skipped - self.learned)",
        "self.flags + self.skipped",
        "skips that the host already counted are counted twice",
    ),
    Mutant(
        "optim/steps",
        "if self._seen is None or self._seen.grad is None:",
        "if self._seen is None:",
        "a parameter that has lost its gradient still counts as one that has one",
    ),
    Mutant(
        "optim/steps",
        "news = max(flags - self.learned, 0)",
        "news = flags",
        "all of the device's skips are counted again at each reading",
    ),
    Mutant(
        "optim/steps",
        "        if self._depth > 0:\n            return False\n",
        "",
        "a nested call of step() is counted as a separate step",
    ),
    Mutant(
        "monitor/callback",
        "return bool(interval and (steps == 1 or steps % interval == 0))",
        "return bool(interval and steps % interval == 0)",
        "the first step is not measured",
    ),
    Mutant(
        "monitor/callback",
        "if watched.counter.taken >= watched.due:",
        "if watched.counter.taken > watched.due:",
        "a measurement comes one step late",
    ),
    Mutant(
        "monitor/callback",
        "watched.has_statistics |= _is_due",
        "watched.has_statistics = _is_due",
        "a later step of the batch cancels the statistics that an earlier one has left",
    ),
    Mutant(
        "monitor/callback",
        "watched.has_histograms |= _is_due",
        "watched.has_histograms = _is_due",
        "a later step of the batch cancels the histograms that an earlier one has left",
    ),
    Mutant(
        "monitor/callback",
        "step = sent.step - (int(skipped) - sent.learned)",
        "step = sent.step",
        "the logged step ignores what the device has skipped meanwhile",
    ),
    Mutant(
        "monitor/callback",
        "return taken + 1 if watched.is_resumed else self._next_due(taken)",
        "return self._next_due(taken)",
        "the first step after a checkpoint is not judged",
    ),
    Mutant(
        "monitor/callback",
        (
            "            try:\n"
            "                hook()\n"
            "            except Exception:\n"
            "                self._report()"
        ),
        "            hook()",
        "an exception in a hook stops the run",
    ),
    Mutant(
        "monitor/callback",
        "            if not watched.is_sharded:\n                watched.due = sys.maxsize\n",
        "",
        "an optimizer that is not sharded stays due after monitoring was switched off",
    ),
    Mutant(
        "monitor/callback",
        "        for counter in self._counters:\n            counter.remove()\n",
        "",
        "hooks stay on the optimizer after the run",
    ),
    Mutant(
        "monitor/callback",
        "            self._guard(watched.counter.close)\n",
        "            pass\n",
        "the end of a batch does not resolve the expected step",
    ),
    Mutant(
        "monitor/callback",
        '        if stage == "fit":\n            self._saved = {}',
        "        pass",
        "a second fit begins with the state that an earlier one has left",
    ),
    Mutant(
        "monitor/callback",
        "has_statistics=sent.has_statistics and not is_skipped and",
        "has_statistics=sent.has_statistics and",
        "a step that the device skipped is logged as if it was taken",
    ),
    Mutant(
        "optim/mixin",
        "            built.counter.taken = built.steps = steps_taken(built.optimizer)",
        "            pass",
        "the mixin's counter does not begin at the checkpoint's step",
    ),
    Mutant(
        "optim/mixin",
        "            if built.counter.taken == built.steps:\n                return\n",
        "",
        "the schedule advances although the step was skipped",
    ),
    Mutant(
        "optim/mixin",
        '            groups[-2]["lr"] = groups[-1]["lr"]',
        "            pass",
        "the group that is unfrozen in two parts has two learning rates",
    ),
    Mutant(
        "optim/mixin",
        '            group["lr"] *= group.get(LR_RATIO, 1.0)',
        "            pass",
        "lr_find gives all groups one learning rate",
    ),
    Mutant(
        "optim/mixin",
        (
            '        settle_unscaling(built.optimizer, loaded["param_groups"][0].get("fused")'
            ", self.trainer)\n"
        ),
        "",
        "a resumed optimizer keeps the unscaling of the one that was built",
    ),
    Mutant(
        "optim/build",
        "let_unscale(optimizer, fused and precision.scaler is not None and not is_clipped)",
        "let_unscale(optimizer, fused and not is_clipped)",
        "a fused step unscales although there is no scaler",
    ),
    Mutant(
        "optim/build",
        "let_unscale(optimizer, fused and precision.scaler is not None and not is_clipped)",
        "let_unscale(optimizer, fused and precision.scaler is not None)",
        "a fused step unscales gradients that clipping has unscaled",
    ),
    Mutant(
        "optim/build",
        "is_clipped = bool(clips) and module.automatic_optimization",
        "is_clipped = bool(clips)",
        "manual clipping counts as Lightning's clipping",
    ),
    Mutant(
        "optim/build",
        "steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)",
        "pass",
        "max_steps is ignored under growing accumulation",
    ),
    Mutant(
        "optim/build",
        "math.ceil(batches / accumulations[epoch])",
        "math.floor(batches / accumulations[epoch])",
        "the last, shorter accumulation of an epoch is not counted",
    ),
    Mutant(
        "optim/build",
        "        return 10**9\n",
        "        return 1\n",
        "a smoke test gets a schedule of one step",
    ),
    Mutant(
        "statistics/measurement",
        "if row.settings.weight_decay > 0:",
        "if row.settings.weight_decay >= 0:",
        "tensors without decay count as decayed",
    ),
    Mutant(
        "statistics/measurement",
        "key = (id(row.settings), row.has_amsgrad)",
        "key = (id(row.settings), False)",
        "tensors with and without AMSGrad are measured alike",
    ),
    Mutant(
        "statistics/measurement",
        "np.where(are_maxima, largest, added)",
        "np.where(are_maxima, added, added)",
        "a maximum is added up over tensors",
    ),
    Mutant(
        "statistics/measurement",
        "math.inf if math.isnan(value) else value for",
        "-math.inf if math.isnan(value) else value for",
        "the worst tensor is not one that is NaN",
    ),
    Mutant(
        "optim/schedulers",
        "if steps is not None and warmup_steps > steps:",
        "if steps is not None and warmup_steps >= steps:",
        "a warm-up as long as the run is refused",
    ),
    Mutant(
        "optim/schedulers",
        "warmup_steps = round(config.warmup_ratio * end)",
        "warmup_steps = int(config.warmup_ratio * end)",
        "the steps of a warm-up ratio are rounded down",
    ),
    Mutant(
        "optim/schedulers",
        "return min_lr_ratio + (1 - min_lr_ratio) * left",
        "return min_lr_ratio + left",
        "the lowest learning rate is added on top of the decay",
    ),
    Mutant(
        "optim/schedulers",
        'scheduler.min_lrs[index] *= peak / group["initial_lr"]',
        "pass",
        "the plateau's lowest learning rates do not follow a new peak",
    ),
    Mutant(
        "optim/schedulers",
        "            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])",
        "            pass",
        "a group that is added later has no schedule",
    ),
    Mutant(
        "statistics/kernels/eager",
        "return undone / (1 - self.decay_rate) if self.is_decoupled else undone",
        "return undone",
        "the weights before the step are computed without undoing decoupled decay",
    ),
    Mutant(
        "statistics/kernels/eager",
        "return self.v_own if self.v_max is None else self.v_max / self.bias2",
        "return self.v_own",
        "AMSGrad's maximum is ignored in the denominator",
    ),
    Mutant(
        "optim/param_groups",
        "isinstance(owner, EMBEDDINGS + NORMALISATIONS)",
        "isinstance(owner, NORMALISATIONS)",
        "embeddings decay",
    ),
    Mutant(
        "optim/param_groups",
        "free = [position for position in matched if chosen[position] == REST]",
        "free = matched",
        "a later group takes what an earlier one has matched",
    ),
    Mutant(
        "optim/param_groups",
        '(0, "stem") if position < first else (head, "")',
        '(head, "")',
        "layer decay leaves out parameters below the first layer",
    ),
    Mutant(
        "optim/param_groups",
        '"initial_lr": group["lr"] / share if share else group["lr"]}',
        '"initial_lr": group["lr"]}',
        "a group added in the middle of a schedule takes its current lr as its peak",
    ),
    Mutant(
        "optim/param_groups",
        "0.0 if spared else weight_decay",
        "weight_decay",
        "biases and norms decay",
    ),
    Mutant(
        "optim/param_groups",
        "module.named_parameters(remove_duplicate=False)",
        "module.named_parameters()",
        "a tied parameter is matched by its first name alone",
    ),
    Mutant(
        "optim/param_groups",
        "LR_RATIO: group.lr_scale * layer.lr_scale,",
        "LR_RATIO: group.lr_scale,",
        "the lr ratio that lr_find restores lacks the layer's scale",
    ),
    Mutant(
        "optim/resume",
        'settings["lr"] = float(peak_lr(group))',
        'settings["lr"] = float(group["lr"])',
        "learning rates are compared at the current step, not at their peaks",
    ),
    Mutant(
        "optim/resume",
        'yield {**own, "lr": peak_lr(own) * schedule_share(saved_groups[0])}',
        "yield own",
        "a group that the checkpoint lacks restarts its schedule",
    ),
    Mutant(
        "optim/resume",
        'entry.get("max_exp_avg_sq", entry["exp_avg_sq"].clone())',
        'entry["exp_avg_sq"].clone()',
        "AMSGrad's maximum is lost on resume",
    ),
    Mutant(
        "optim/resume",
        "kind = Adam if type(optimizer).step is AdamW.step else type(optimizer)",
        "kind = type(optimizer)",
        "AdamW cannot resume from the state of Adam",
    ),
    Mutant(
        "optim/resume",
        "scheduler.last_epoch, steps = steps - 1, 1",
        "scheduler.last_epoch, steps = steps, 1",
        "a resumed schedule is one step ahead",
    ),
    Mutant(
        "optim/resume",
        'if saved["mode"] == scheduler.mode:',
        "if True:",
        "a plateau resumes with the best value of the other mode",
    ),
    Mutant(
        "optim/resume",
        "return numbers[0] if numbers and all(each == settings[0] for each in settings) else None",
        "return numbers[0] if numbers else None",
        "groups that are merged take the settings of the first of them",
    ),
    Mutant(
        "statistics/views",
        '            first += len(group["params"])\n',
        "",
        "a parameter's position counts from its group's first",
    ),
    Mutant(
        "statistics/views",
        "return _is_dense(view.parameter) and all(",
        "return all(",
        "a tensor with gaps in memory is read as one without",
    ),
    Mutant(
        "statistics/views",
        'name.split(".")[:-1][: self._layer_depth]',
        'name.split(".")[: self._layer_depth]',
        "a parameter is its own layer",
    ),
    Mutant(
        "statistics/views",
        '(step.__module__, step.__qualname__) == (Adam.__module__, "Adam.step")',
        "True",
        "a subclass with its own step is measured as Adam",
    ),
    Mutant(
        "statistics/views",
        " or grad.layout is not torch.strided",
        "",
        "a sparse gradient is read as a dense one",
    ),
    Mutant(
        "statistics/views",
        'third = "max_exp_avg_sq" if group.get("amsgrad") else ""',
        'third = "max_exp_avg_sq"',
        "a maximum that AMSGrad has left is used after it was switched off",
    ),
    Mutant(
        "statistics/histograms",
        "    shown[-1] += counts[-1]\n",
        "",
        "infinite and NaN elements are missing from the histogram",
    ),
    Mutant(
        "findings/rules",
        "is_all = denominator_mean < denominator_below * eps",
        "is_all = True",
        "rows whose gradient became 0 raise eps_dominates",
    ),
    Mutant(
        "findings/rules",
        'is_over = lr == 0 and past.largest("lr") > 0',
        "is_over = lr == 0",
        "the first step of a warm-up is the end of a schedule",
    ),
    Mutant(
        "findings/rules",
        "is_too_old = step == 1 and not is_of_one_gradient",
        "is_too_old = False",
        "old moments beside a step counter that restarted are not found",
    ),
    Mutant(
        "findings/rules",
        "return not lr < 0.01 * training.peak_lr",
        "return True",
        "lost updates count at the end of a schedule",
    ),
    Mutant(
        "findings/watch",
        "count.held = count.held + 1 if holds else 0",
        "count.held = count.held + holds",
        "measurements that raise a finding need not follow each other",
    ),
    Mutant(
        "findings/watch",
        "elif place not in self._open and count.held >= rule.persistence:",
        "elif place not in self._open and count.held > rule.persistence:",
        "a finding is raised one measurement late",
    ),
    Mutant(
        "findings/watch",
        "causes = {place.code for place, holds in holding.items() if holds}",
        "causes = set()",
        "a symptom is raised beside its root cause",
    ),
    Mutant(
        "findings/watch",
        "math.inf if math.isnan(value) else value for",
        "-math.inf if math.isnan(value) else value for",
        "a tensor that is NaN is not the worst",
    ),
    Mutant(
        "findings/watch",
        "Place(code, scope): _Count(held, ceased)",
        "Place(code, scope): _Count()",
        "counts towards a finding are lost on resume",
    ),
    Mutant(
        "findings/remedies",
        "math.floor(math.log10(low / 20))",
        "math.ceil(math.log10(low / 20))",
        "the suggested eps is ten times too large",
    ),
    Mutant(
        "findings/remedies",
        "min(10 * (1 - beta2), 0.1)",
        "10 * (1 - beta2)",
        "the suggested β2 may fall below 0.9",
    ),
    Mutant(
        "findings/remedies",
        'is_large = case.setting("eps") > 1e-8',
        "is_large = False",
        "full precision is suggested with an eps for half precision",
    ),
    Mutant(
        "findings/preflight",
        "if 1 - beta2 < resolution / 4:",
        "if 1 - beta2 < resolution / 2:",
        "a second moment that can decay is reported as stalled",
    ),
    Mutant(
        "findings/preflight",
        "elif 1 / rate < 0.1 * training.steps_per_epoch:",
        "elif 1 / rate < training.steps_per_epoch:",
        "decay within an epoch is reported as too short a timescale",
    ),
    Mutant(
        "findings/preflight",
        "abs(planned - steps) <= 0.01 * steps",
        "planned - steps <= 0.01 * steps",
        "a schedule that is too short raises no preflight notice",
    ),
    Mutant(
        "monitor/finding_reporter",
        "return matters and self._told[_same(finding)] <= MOST_OFTEN",
        "return matters",
        "a recurring finding is printed every time",
    ),
    Mutant(
        "monitor/finding_reporter",
        'self._first_loss = state.get("first_loss", math.nan)',
        "pass",
        "after a resume the loss is compared with its first value since",
    ),
    Mutant(
        "tune/plan",
        "len(found) + self.n_seeds - 1",
        "len(found)",
        "a stage that can be counted has no trials for further seeds",
    ),
    Mutant(
        "tune/plan",
        "part = max(round(parts[stage.name]), self.n_seeds)",
        "part = round(parts[stage.name])",
        "a stage gets fewer trials than its first point has seeds",
    ),
    Mutant(
        "tune/plan",
        "if candidate != point and candidate not in found:",
        "if candidate not in found:",
        "the incumbent is tried again as a first point",
    ),
    Mutant(
        "tune/plan",
        "stage for stage in searched if stage.trials_from <= n_trials)",
        "stage for stage in searched if stage.trials_from < n_trials)",
        "a stage needs one trial more than its config says",
    ),
    Mutant(
        "tune/decision",
        "math.sqrt(squares / degrees * (1 / counts[0] + 1 / counts[1]))",
        "math.sqrt(squares / degrees)",
        "the standard error of a difference ignores the number of seeds",
    ),
    Mutant(
        "tune/decision",
        "if gain > spread:",
        "if gain > 0:",
        "a gain within the standard error is accepted",
    ),
    Mutant(
        "tune/decision",
        "is_better = not math.isfinite(first) or sign * (metric_of(best) - first) < 0",
        "is_better = sign * (metric_of(best) - first) < 0",
        "an incumbent that failed is never beaten",
    ),
    Mutant(
        "tune/progress",
        "if not each.is_lost or each.attempt >= ATTEMPTS]",
        "if not each.is_lost or each.attempt > ATTEMPTS]",
        "a trial that was lost twice is tried a third time",
    ),
    Mutant(
        "tune/progress",
        "        used += len(records)\n",
        "",
        "stages spend trials that earlier ones have used",
    ),
    Mutant(
        "tune/progress",
        "room = max(1, part - (plan.n_seeds - 1)) - len(explored)",
        "room = max(1, part) - len(explored)",
        "no trials are kept for the challenger's further seeds",
    ),
    Mutant(
        "tune/sampling",
        "min(each, worst) if math.isfinite(each) else worst",
        "each if math.isfinite(each) else worst",
        "one diverged trial flattens the differences among the good ones",
    ),
    Mutant(
        "tune/sampling",
        "if coordinates_of(space, point) not in known:",
        "if True:",
        "a known point is proposed again",
    ),
    Mutant(
        "tune/dimensions",
        "decay = rounded(per_step / point.lr)",
        "decay = rounded(per_step)",
        "a decay per step is taken for a weight_decay",
    ),
    Mutant(
        "tune/dimensions",
        "(value == 0 and self.may_be_zero and not is_end)",
        "(value == 0 and self.may_be_zero)",
        "0 is taken as the end of a logarithmic range",
    ),
    Mutant(
        "tune/archive",
        "if not math.isfinite(value):",
        "if math.isnan(value):",
        "an infinite metric is a result",
    ),
    Mutant(
        "tune/archive", ' if "withdrawn" not in each.user_attrs]', "]", "a withdrawn trial counts"
    ),
    Mutant(
        "tune/archive",
        "PercentilePruner(75.0,",
        "PercentilePruner(25.0,",
        "three quarters of the trials are pruned",
    ),
    Mutant(
        "tune/search",
        "may_stop = stage is not None and wanted.turn == 0",
        "may_stop = stage is not None",
        "a point's further seeds are pruned",
    ),
    Mutant(
        "tune/search",
        "wanted = again[:1] or progress.wanted[: self.plan.n_jobs]",
        "wanted = progress.wanted[: self.plan.n_jobs]",
        "a lost trial is repeated beside others",
    ),
    Mutant(
        "reports/runs",
        "self.findings = self.findings if other.findings is None else other.findings",
        "self.findings = other.findings",
        "a resumed part without findings hides those of the first",
    ),
    Mutant(
        "reports/runs",
        'if line.endswith("\\n"):',
        "if line:",
        "a line that was cut is read as a whole one",
    ),
    Mutant(
        "reports/runs",
        'step = int(row.pop(X_AXIS, row.get("_step", 0)))',
        'step = int(row.get("_step", 0))',
        "W&B's own steps are the x-axis",
    ),
    Mutant(
        "reports/runs",
        "is_last = np.append((np.diff(numbers) != 0) | (np.diff(steps) != 0), True)",
        "is_last = np.append(True, (np.diff(numbers) != 0) | (np.diff(steps) != 0))",
        "of two rows for the same step the earlier one counts",
    ),
    Mutant(
        "reports/reduction",
        "np.argmax(np.where(finite, part, -np.inf))",
        "np.argmax(part)",
        "a non-finite value hides the largest finite value of its bucket",
    ),
    Mutant(
        "reports/reduction",
        "np.nan_to_num(np.abs(values), nan=-1.0, posinf=np.inf)",
        "np.nan_to_num(values, nan=-1.0, posinf=np.inf)",
        "a map shows the largest value, not the largest magnitude",
    ),
    Mutant(
        "reports/reduction",
        "return bool(every.min() >= 0 and positive",
        "return bool(positive",
        "values of both signs are drawn on a logarithmic axis",
    ),
    Mutant(
        "reports/panels",
        "return re.fullmatch(self.keys, key) is not None",
        "return re.match(self.keys, key) is not None",
        "a panel draws keys that only share a prefix with its own",
    ),
    Mutant(
        "reports/panels",
        "key=lambda panel: not panel.matters",
        "key=lambda panel: panel.matters",
        "the panels that matter come last",
    ),
    Mutant(
        "reports/report",
        "first.setdefault((place, finding.code), finding.step - 1)",
        "first.setdefault((place, finding.code), finding.step)",
        "a finding's mark stands one step late",
    ),
    Mutant(
        "reports/report",
        '(int(part or 0), "") if part.isdecimal() else (0, part) for part',
        "(0, part) for part",
        "layer 10 stands before layer 2",
    ),
    Mutant(
        "reports/keys",
        "(?:/optimizer/(.+?))?",
        "(?:/optimizer/(.+))?",
        "the name of an optimizer absorbs that of the layer",
    ),
    Mutant(
        "reports/comparison",
        'if statistic.family == "schedule" or statistic.name == "exp_avg_mean":',
        'if statistic.name == "exp_avg_mean":',
        "runs count as different where their learning rates differ",
    ),
    Mutant(
        "statistics/kernels/eager",
        "return ~(self.v_hat <= 0)",
        "return self.v_hat > 0",
        "an element whose second moment is NaN has no denominator (eager)",
    ),
    Mutant(
        "statistics/kernels/eager",
        "signed = -self.g if self.settings.maximize else self.g",
        "signed = self.g",
        "maximize does not negate the gradient (eager)",
    ),
    Mutant(
        "statistics/kernels/eager",
        "(e.active & (e.denominator < e.settings.eps)).sum()",
        "(e.denominator < e.settings.eps).sum()",
        "idle elements are dominated by eps (eager)",
    ),
    Mutant(
        "statistics/kernels/numba_loops",
        "over_second_moment = e.entered * min(own_inverse, by.inverse_eps)",
        "over_second_moment = e.entered * own_inverse",
        "eps does not bound how far the second moment lags (numba)",
    ),
    Mutant(
        "statistics/kernels/numba_loops",
        "row[column + 2] += three >> 20",
        "row[column + 2] += (three >> 20) & 0x1FF",
        "the third count of a block overflows at 512 (numba)",
    ),
    Mutant(
        "statistics/kernels/numba_loops",
        "np.sqrt(v_max) * by.root",
        "np.sqrt(v_max)",
        "AMSGrad's maximum is not corrected for its bias (numba)",
    ),
    Mutant(
        "statistics/kernels/numba_loops",
        "bits = builder.add(builder.add(bits, odd), bits.type(0x7FFF))",
        "bits = builder.add(bits, bits.type(0x8000))",
        "ties round away from 0 in bfloat16 (numba)",
    ),
    Mutant(
        "statistics/kernels/numba",
        '"update_squares": of.lr**2 * row["direction_squares"]',
        '"update_squares": of.lr * row["direction_squares"]',
        "the squared update has one factor of the learning rate (numba)",
    ),
    Mutant(
        "statistics/kernels/numba",
        'of.sign * row["exp_avg_times_entered"]',
        'row["exp_avg_times_entered"]',
        "maximize does not negate the gradient (numba)",
    ),
    Mutant(
        "statistics/kernels/triton",
        "lost * (2 * e.u + lost)",
        "lost * (e.u + lost)",
        "half of the energy lost to eps is left out (triton)",
    ),
    Mutant(
        "statistics/kernels/triton",
        "v_hat = tl.where(tensor.v_max != 0, v_max, v)",
        "v_hat = v_max",
        "tensors without AMSGrad beside some with it have no denominator (triton)",
    ),
    Mutant(
        "statistics/kernels/triton",
        "places = (tensor.first_chunk + part)[:, None] * _WIDTH",
        "places = part[:, None] * _WIDTH",
        "each tensor adds up the chunks of the first (triton)",
    ),
    Mutant(
        "statistics/accumulators",
        "ENTERED = GRADIENT | Knowledge.STEP",
        "ENTERED = Knowledge.STEP",
        "the effective gradient is reported where gradients are unknown",
    ),
    Mutant(
        "statistics/catalogue",
        "if bool(decoupled_elements) == bool(coupled_elements):",
        "if not decoupled_elements and not coupled_elements:",
        "coupled and decoupled decay are added up to one norm",
    ),
    Mutant(
        "statistics/catalogue",
        "return of_any(largest) if largest == -negated_smallest else None",
        "return of_any(largest)",
        "groups with different settings report the largest",
    ),
    Mutant(
        "statistics/catalogue",
        "return None if math.isnan(skipped_steps) else of_any(skipped_steps)",
        "return of_any(skipped_steps)",
        "an unknown number of skipped steps is logged as NaN",
    ),
    Mutant(
        "optim/optimizers",
        "return named if len(set(named)) == len(named) else numbers",
        "return named",
        "two optimizers may have one name",
    ),
    Mutant(
        "optim/optimizers",
        'peak = group.get("initial_lr", group.get("lr"))',
        'peak = group.get("lr")',
        "the recorded learning rate is that of the schedule's first step",
    ),
    Mutant(
        "optim/optimizers",
        "return known | factory.keywords",
        "return factory.keywords | known",
        "the defaults of a class win over the arguments of the config",
    ),
    Mutant(
        "optim/optimizers",
        'eps, place = group.get("eps", config.eps), where',
        "eps, place = config.eps, where",
        "a group's own eps may be 0 in its dtype",
    ),
    Mutant(
        "config/reading",
        "        taken += names\n",
        "        taken.append(group.name)\n",
        "a group may have the name of another group's no_decay part",
    ),
    Mutant(
        "config/reading",
        "interval = Interval.step if counts_steps else config.interval",
        "interval = config.interval",
        "a scheduler that counts steps is stepped by epochs",
    ),
    Mutant(
        "config/forms",
        "len(betas) == 2 and all(0 <= beta < 1 for beta in betas)",
        "len(betas) == 2 and all(0 <= beta <= 1 for beta in betas)",
        "a beta of 1 is accepted",
    ),
    Mutant(
        "config/forms",
        (
            "    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):\n"
            "        return\n"
        ),
        "",
        "a target with **kwargs refuses arguments that it takes",
    ),
    Mutant(
        "config/forms",
        "return value.item() if isinstance(value, np.generic) else value",
        "return value",
        "scalars of numpy are refused",
    ),
    Mutant(
        "monitor/loggers",
        "for logger in trainer.loggers if values else ():",
        "for logger in trainer.loggers:",
        "empty rows are logged",
    ),
    Mutant(
        "monitor/loggers",
        'holding = [row["code"] for row in rows if row["closed"] is None]',
        'holding = [row["code"] for row in rows]',
        "findings that have ended are listed as open",
    ),
    Mutant(
        "monitor/loggers",
        "rows, self.rows = self.rows, []",
        "rows = self.rows",
        "rows of the layer table are sent repeatedly",
    ),
    Mutant(
        "reports/inspection/saved",
        (
            "        if first != [len(possible) - 1 - place for place in last[::-1]]:\n"
            "            return None\n"
        ),
        "",
        "parameters are guessed where there are several ways to match them",
    ),
    Mutant(
        "reports/inspection/saved",
        'group["lr"] = group["lr"] if float(group["lr"]) else peak_lr(saved)',
        "pass",
        "at the end of a schedule all updates are 0",
    ),
    Mutant(
        "reports/inspection/saved",
        "if names is None and len(found) > 1 and not usual:",
        "if False:",
        "one of two networks of the same shapes is chosen silently",
    ),
    Mutant(
        "reports/inspection/numbers",
        "knowledge_of(saved.optimizer, views) & ~Knowledge.GRADIENT",
        "knowledge_of(saved.optimizer, views)",
        "gradients that no file contains are reported as 0",
    ),
    Mutant(
        "reports/inspection/numbers",
        "\n        and (saved.weights or not OF_WEIGHTS & _columns(each))",
        "",
        "unknown weights are reported as 0",
    ),
    Mutant(
        "monitor/flight_recorder/recorder",
        "GRAVITY[reason] <= GRAVITY[other]",
        "GRAVITY[reason] < GRAVITY[other]",
        "every spike in a row is written",
    ),
    Mutant(
        "monitor/flight_recorder/recorder",
        "number = taken.number - (int(skipped) - taken.learned)",
        "number = taken.number",
        "recorded steps ignore what the device has skipped",
    ),
    Mutant(
        "monitor/flight_recorder/recorder",
        "if was_finite and not is_finite:",
        "if not is_finite:",
        "a run that stays NaN is written repeatedly",
    ),
    Mutant(
        "monitor/flight_recorder/file",
        "last = max(broken, key=lambda name: order.get(name, -1))",
        "last = min(broken, key=lambda name: order.get(name, -1))",
        "of several broken layers the one nearest to the input is named",
    ),
    Mutant(
        "monitor/flight_recorder/loss_spikes",
        "return level > max(self._before) and level > self._threshold()",
        "return level > self._threshold()",
        "a loss that was as high before counts as a spike",
    ),
    Mutant(
        "monitor/flight_recorder/loss_spikes",
        "sorted(self._latest)[LATEST // 2]",
        "sorted(self._latest)[-1]",
        "one bad batch is a spike",
    ),
    Mutant(
        "config/reading",
        "counts_steps = TOTAL_STEPS in factory.keywords.values()",
        'counts_steps = factory.keywords.get("T_max") == TOTAL_STEPS',
        "only one argument of a scheduler may ask for total_steps",
    ),
    Mutant(
        "config/reading",
        "if {entry.name for entry in fields(AdamConfig)} <= {*factory.keywords, *ours}:",
        "if {entry.name for entry in fields(AdamConfig)} <= {*factory.keywords}:",
        "a custom class merged into a preset is used as the target",
    ),
    Mutant(
        "config/reading",
        "    if rate is None and pattern is not None:\n"
        '        raise refusal(where, "rate", None, "expected one beside a pattern", 0.75)\n',
        "",
        "a layer decay without a rate is accepted",
    ),
    Mutant(
        "config/forms",
        "elif value is not None and not limits.accepts(value):",
        "elif value and not limits.accepts(value):",
        "0 is accepted everywhere",
    ),
    Mutant(
        "config/forms",
        "if not key.startswith(where):",
        "if not key:",
        "an error names a field without its path",
    ),
    Mutant(
        "config/schema",
        "weight_decay_on: WeightDecayOn = WeightDecayOn.matrices",
        "weight_decay_on: WeightDecayOn = WeightDecayOn.all",
        "all parameters decay by default",
    ),
    Mutant(
        "config/schema",
        "    threshold: float = 1e-4",
        "    threshold: float = 1e-3",
        "a plateau's default threshold is not the documented one",
    ),
    Mutant(
        "optim/param_groups",
        "head = len(layers) + 1",
        "head = len(layers)",
        "the last layer learns as fast as the head",
    ),
    Mutant(
        "optim/param_groups",
        'settings["lr"] = hyperparameters["lr"] * lr_scale',
        'settings["lr"] = hyperparameters["lr"] * group.lr_scale',
        "layer decay scales no learning rate",
    ),
)
