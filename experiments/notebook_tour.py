# %% [markdown]
# # A tour of the trainer, cell by cell
#
# Open it in an editor that knows percent cells, paste it into `uv run ipython`, or run it:
# `uv run python -m experiments.notebook_tour`. It takes a minute or two on a laptop, offline, and leaves `runs/tour`.

# %% A run is a config: plain, frozen data.
import shutil
from dataclasses import replace
from pathlib import Path

import jax

from grug_native import (
    MODEL_PRESETS,
    AdamWConfig,
    GrugEvalConfig,
    GrugNativeRunConfig,
    GrugRunner,
    GrugTrainerConfig,
    MuonConfig,
    ScheduleConfig,
)
from grug_native.data.corpus import embedded_corpus
from grug_native.debug import first_nonfinite
from grug_native.tracking.progress import configure_logging

configure_logging()
shutil.rmtree("runs/tour", ignore_errors=True)
config = GrugNativeRunConfig(
    model=replace(MODEL_PRESETS["tiny"], vocab_size=1024, num_layers=2, max_seq_len=128),
    data=embedded_corpus("runs/corpora", vocab_size=1024),
    optimizer=AdamWConfig(learning_rate=3e-3, schedule=ScheduleConfig(warmup=5)),
    trainer=GrugTrainerConfig(num_train_steps=30, train_batch_size=8),
    eval=GrugEvalConfig(steps_per_eval=15, max_eval_batches=2, sample_prompts=("def main(",)),
    output_path="runs/tour",
)
runner = GrugRunner(config)
print(runner)

# %% What it is going to be. `compile=True` adds the memory, `measure=3` the time.
plan = runner.plan()
print(plan)
print(f"{plan.parameters['total']:,} parameters, {plan.tokens_per_parameter:.2f} tokens for each")

# %% The batch of any step is a function of the config and the step. Here it is as text, a document a line.
print(runner.show_batch(0))

# %% Steps by hand. The state goes in and the next one comes out; the old one's memory is reused.
state = runner.init_state()
batch = runner.batch(0)
state, metrics = runner.train_step(state, batch)
print(f"loss {float(metrics.loss):.3f}, gradient norm {float(metrics.grad_norm):.3f}")

# %% Looking inside: gradients and activations by module, an array over the layers for what is in a block.
print(runner.norms(state, batch))
print("not finite:", first_nonfinite(state))

# %% The computation itself, as text.
print(runner.hlo()[:400])

# %% Held-out loss and bits per byte, domain by domain.
scores = runner.evaluate(state)
print({name: round(value, 3) for name, value in scores.items() if name.endswith("bpb_exact")})

# %% The whole run: it evaluates, samples, saves, draws. Ctrl-C saves and returns the state; calling again goes on.
state = runner.fit(stop_after=20)
state = runner.fit()

# %% What it has learned, which is not much yet, and the curves.
print(runner.sample(state, "def main(", max_new_tokens=40, temperature=0.7, top_k=20, seed=1))
runner.plot().savefig("runs/tour/tour.png")
print(Path("runs/tour/samples.md").read_text()[-400:])

# %% A state comes back from its checkpoint, to the bit.
again = GrugRunner(config).restore()
assert all((one == other).all() for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))

# %% An experiment is a changed config in a folder of its own.
other = GrugRunner(replace(config, optimizer=MuonConfig(learning_rate=0.02), output_path="runs/tour-muon"))
print({route.path: route.group for route in other.plan().routing})
