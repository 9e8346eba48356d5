"""B2EASampler in a search of Ray Tune's: ten trials of a formula with three mixed parameters, two at a time.

Ray is no dependency of the package: ``pip install 'ray[tune]'``. Prints how many trials came from the models and the
best one; says so where Ray is missing.

    python benchmarks/ray_tune.py
"""

import math
from importlib.util import find_spec
from typing import Any

TRIALS = 10


def training(config: dict[str, Any]) -> dict[str, float]:
    """A formula in the place of a training, in a process of Ray's."""
    loss = (math.log10(config["lr"]) + 2) ** 2 + (math.log2(config["width"]) - 5) ** 2 / 4
    return {"loss": loss + 0.5 * (config["optimizer"] == "sgd")}


def main() -> None:
    if find_spec("ray") is None:
        print("Ray is missing; run `pip install 'ray[tune]'`")
        return
    import ray
    from _report import describe_machine
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from lightning_plugins.search import B2EASampler, origins

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    search = OptunaSearch(sampler=B2EASampler(seed=0))
    space = {
        "lr": tune.loguniform(1e-4, 1.0),
        "width": tune.randint(8, 257),
        "optimizer": tune.choice(["sgd", "adam"]),
    }
    settings = tune.TuneConfig(
        metric="loss",
        mode="min",
        search_alg=ConcurrencyLimiter(search, max_concurrent=2),
        num_samples=TRIALS,
        reuse_actors=True,
    )
    results = tune.Tuner(training, param_space=space, tune_config=settings).fit()
    best = results.get_best_result()
    print(f"{describe_machine('cpu')}; Ray {ray.__version__}")
    print(
        f"{len(results)} trials, {results.num_errors} errors, {len(origins(search._ot_study))} proposed by the models"
    )
    print(f"best loss {best.metrics['loss']:.3f} with {best.config}")


if __name__ == "__main__":
    main()
