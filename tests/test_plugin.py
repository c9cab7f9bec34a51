"""The plug-in against the lm-eval that is installed; what changes a process for good runs in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin

STOCK_MODELS = ("hf", "dummy", "hf-multimodal", "vllm-vlm")


def python(code: str, *options: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with the plug-in on unless a variable turns it off."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDVLM_")}
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done


# Start of Python


def test_a_start_of_python_imports_two_modules_more() -> None:
    """The two are ours: typing, pathlib or importlib.metadata alone would cost more than all that the plug-in does."""
    package = Path(plugin.__file__).parent
    code = """
        import os, sys  # every site imports os
        bare = set(sys.modules)
        sys.path.insert(0, {path!r})
        import medvlm_harness.plugin
        medvlm_harness.plugin.autoload()
        assert medvlm_harness.plugin.is_active()
        print(*sorted(set(sys.modules) - bare))
    """
    done = python(code.format(path=str(package.parent)), "-I", "-S")
    assert done.stdout.split() == ["medvlm_harness", "medvlm_harness.plugin"]


def test_the_package_alone_imports_nothing() -> None:
    package = Path(plugin.__file__).parent
    code = """
        import sys
        bare = set(sys.modules)
        sys.path.insert(0, {path!r})
        import medvlm_harness
        print(*sorted(set(sys.modules) - bare))
    """
    assert python(code.format(path=str(package.parent)), "-I", "-S").stdout.split() == ["medvlm_harness"]


def test_it_is_active_at_start_and_off_when_asked() -> None:
    code = "import medvlm_harness.plugin as p; print(p.is_active())"
    assert python(code).stdout == "True\n"
    assert python(code, MEDVLM_NO_AUTOLOAD="0").stdout == "True\n"
    assert python(code, MEDVLM_NO_AUTOLOAD="1").stdout == "False\n"


def test_autoload_without_site_does_nothing_and_does_not_raise() -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(plugin.__file__).parents[1])!r})
        sys.modules.pop("os", None)
        import medvlm_harness.plugin as p
        p.autoload()
        print(p.is_active())
    """
    assert python(code, "-I", "-S").stdout == "False\n"


def test_the_finder_leaves_all_other_modules_alone() -> None:
    finder = plugin._Finder()
    for name in ("json", "lm_eval", "lm_eval.tasks", "lm_eval.models.dummy", "medvlm_harness", "no_such_module"):
        assert finder.find_spec(name) is None


def test_an_lm_eval_that_is_missing_is_missing_as_ever() -> None:
    code = """
        import sys
        sys.modules["lm_eval"] = None
        try:
            import lm_eval.models
        except ModuleNotFoundError as error:
            print(error.name)
    """
    done = python(code)
    assert done.stdout.startswith("lm_eval")
    assert done.stderr == ""


# Patches


def test_a_patch_that_fails_says_so_in_one_line_and_lm_eval_goes_on() -> None:
    code = """
        import medvlm_harness.plugin as p
        def _does_not_fit(module):
            raise AttributeError("no such thing here")
        p._PATCHES["lm_eval.models"] = _does_not_fit
        import lm_eval.models
        from lm_eval.api.registry import get_model
        print(get_model("dummy").__name__)
    """
    done = python(code)
    assert done.stdout == "DummyLM\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("medvlm-harness: _does_not_fit does not fit this lm-eval")
    assert "AttributeError('no such thing here')" in line


def test_every_patch_fits_the_lm_eval_that_is_installed() -> None:
    code = """
        import importlib
        import medvlm_harness.plugin as p
        for name, patch in p._PATCHES.items():
            module = importlib.import_module(name)
            assert module.__medvlm_patches__ == {patch.__name__}, name
    """
    assert python(code).stderr == ""


WRAPPED = """
    import importlib
    import medvlm_harness.plugin as p

    def depth(function):
        count = 0
        while hasattr(function, "__wrapped__"):
            function, count = function.__wrapped__, count + 1
        return count

    def depths():
        from lm_eval import evaluator, utils
        from lm_eval._cli.harness import HarnessCLI
        from lm_eval.loggers.evaluation_tracker import EvaluationTracker
        from lm_eval.tasks._index import TaskIndex
        save = EvaluationTracker.save_results_aggregated
        return [depth(f) for f in (evaluator.evaluate, utils.make_table, HarnessCLI.execute, save, TaskIndex.build)]
"""


@pytest.mark.parametrize("autoload", ["0", "1"], ids=["before", "after_the_import"])
def test_patches_are_applied_once_whenever_and_however_often_it_is_installed(autoload: str) -> None:
    code = textwrap.dedent(WRAPPED) + textwrap.dedent("""
        before = depths()
        p.install()
        once = depths()
        p.install()
        p.autoload()
        print(before, once, depths(), sum(isinstance(f, p._Finder) for f in __import__("sys").meta_path))
    """)
    stock, patched = [1, 0, 0, 0, 0], [2, 1, 1, 1, 1]  # lm-eval wraps `evaluate` itself
    done = python(code, MEDVLM_NO_AUTOLOAD=autoload)
    expected = [stock if autoload == "1" else patched, patched, patched, 1]
    assert done.stdout == " ".join(map(str, expected)) + "\n"


def test_a_reloaded_module_is_patched_again() -> None:
    code = textwrap.dedent(WRAPPED) + textwrap.dedent("""
        from lm_eval import utils
        for _ in range(2):
            importlib.reload(utils)
            print(depth(utils.make_table))
    """)
    assert python(code).stdout == "1\n1\n"


# Models


@pytest.mark.parametrize(
    "first",
    [
        "import medvlm_harness.model_backends.baseline",
        "import lm_eval.models",
        "import lm_eval.models.dummy",
        "import lm_eval.api.registry",
        "import lm_eval.evaluator",
        "import medvlm_harness.plugin as p; p.install(); import lm_eval.models",
        "import lm_eval.models, medvlm_harness.plugin as p; p.install(); p.install()",
    ],
)
@pytest.mark.parametrize("autoload", ["0", "1"], ids=["autoload", "install"])
def test_stock_models_and_ours_are_known_in_any_order_of_imports(first: str, autoload: str) -> None:
    code = f"""
        {first}
        import medvlm_harness.plugin as p
        p.install()
        import lm_eval.models
        from lm_eval.api.registry import get_model, model_registry
        print(all(name in model_registry for name in {(*STOCK_MODELS, *plugin.model_targets())!r}))
        print(get_model("dummy").__name__, get_model("medvlm-baseline").__name__)
    """
    assert python(code, MEDVLM_NO_AUTOLOAD=autoload).stdout == "True\nDummyLM BaselineBackend\n"


def test_registering_models_imports_no_backend() -> None:
    code = "import lm_eval.models, sys; print('medvlm_harness.model_backends' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_each_registered_model_is_a_model_of_lm_eval() -> None:
    plugin.install()
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    for name in plugin.model_targets():
        assert issubclass(get_model(name), LM)
        assert get_model(name).card.name  # type: ignore[attr-defined]


def test_a_newer_lm_eval_that_reads_entry_points_is_left_alone() -> None:
    code = """
        import lm_eval.api.registry as registry
        registry.load_plugins = lambda: None
        import lm_eval.models
        print("medvlm-baseline" in registry.model_registry, "dummy" in registry.model_registry)
    """
    assert python(code).stdout == "False True\n"


def test_a_name_that_is_taken_stays_whose_it_was() -> None:
    code = """
        from lm_eval.api.registry import model_registry
        model_registry.register("medvlm-tiny", target="somebody.elses:Model")
        import lm_eval.models
        print(model_registry._objs["medvlm-tiny"], "medvlm-baseline" in model_registry)
    """
    done = python(code)
    assert done.stdout == "somebody.elses:Model True\n"
    assert done.stderr == ""


@pytest.mark.parametrize("text", ["not an ini file [", "[lm_eval.models]\nnonsense", "[lm_eval.models]\n= x:y\n"])
def test_a_broken_distribution_of_somebody_else_does_not_hurt(text: str, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(text, encoding="utf-8")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        print("medvlm-baseline" in model_registry)
    """
    done = python(code)
    assert (done.stdout, done.stderr) == ("True\n", "")


# Results


def test_an_aggregation_brings_its_own_error_and_lm_eval_gives_the_others() -> None:
    plugin.install()
    from lm_eval import evaluator_utils
    from lm_eval.api import metrics

    class Ours:
        def __call__(self, items: list[float]) -> float:
            return 0.5

        def stderr(self, items: list[float]) -> float:
            return 0.25

    own = evaluator_utils.stderr_for_metric(metric=Ours(), bootstrap_iters=100)
    assert own([1.0, 2.0]) == 0.25
    values = [0.0, 1.0, 1.0, 4.0]
    stock = metrics.stderr_for_metric(metric=metrics.mean, bootstrap_iters=100)
    assert stock is not None
    assert evaluator_utils.stderr_for_metric(metric=metrics.mean, bootstrap_iters=100)(values) == stock(values)
    assert evaluator_utils.stderr_for_metric(metric=lambda items: 0.0, bootstrap_iters=100) is None
    assert evaluator_utils.stderr_for_metric(metric=metrics.mean, bootstrap_iters=0) is None


def test_the_table_of_a_stock_result_is_unchanged() -> None:
    plugin.install()
    from lm_eval.utils import make_table

    result = {
        "results": {name: {"alias": name, "acc,none": 0.5, "acc_stderr,none": 0.1} for name in ("g", "a")},
        "groups": {"g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "versions": dict.fromkeys("ag", 1),
        "n-shot": dict.fromkeys("ag", 0),
        "higher_is_better": {name: {"acc": True} for name in "ag"},
        "group_subtasks": {"g": ["a"]},
    }
    for arguments in ((), ("results",), ("groups",), ("results", True)):
        assert make_table(result, *arguments) == make_table.__wrapped__(result, *arguments)  # type: ignore[attr-defined]
    assert make_table(result) != make_table(result, "results", True)  # the third argument arrives
    with_ours = {**result, "medvlm": {}}
    assert make_table(with_ours, "groups") == make_table(result, "groups")  # intervals stand once, below the tasks


def test_a_stock_model_on_a_stock_task_passes_through(stock_folder: Path) -> None:
    """The same run with the plug-in and without it, in processes of their own."""
    code = f"""
        import json, sys
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager

        class Model(LM):
            def loglikelihood(self, requests):
                return [(-float(len(request.args[1]) + request.doc["answer"]), False) for request in requests]
            loglikelihood_rolling = generate_until = None

        manager = TaskManager(include_path={str(stock_folder)!r}, include_defaults=False)
        results = lm_eval.simple_evaluate(Model(), tasks=["stock_task"], task_manager=manager, limit=10)
        kept = ("results", "versions", "n-shot", "higher_is_better", "n-samples")
        print("RESULT", json.dumps([type(results).__name__, sorted(results), {{key: results[key] for key in kept}}]))
    """

    def result(autoload: str) -> list[Any]:
        (line,) = (x for x in python(code, MEDVLM_NO_AUTOLOAD=autoload).stdout.splitlines() if x.startswith("RESULT"))
        parsed: list[Any] = json.loads(line.removeprefix("RESULT"))
        return parsed

    with_us, without = result("0"), result("1")
    assert with_us == without
    assert with_us[0] == "dict"
    assert "medvlm" not in with_us[1]
    assert "acc,none" in with_us[2]["results"]["stock_task"]
