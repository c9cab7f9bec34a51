"""How lm-eval finds us: the one file that knows lm-eval's registries.

`medvlm_harness.pth` calls `autoload()` at every start of Python, so nothing but `sys` is imported up here. It installs
a finder that, when one of lm-eval's modules below is imported, runs that module and then one small patch:

    lm_eval.models                      register our model names, lazily
    lm_eval.filters                     register our filter names, lazily
    lm_eval.tasks._index                add our task folder; check the YAML of folders that users include
    lm_eval.evaluator                   refuse what a model cannot do; add our details to the results
    lm_eval.evaluator_utils             let an aggregation bring its own standard error
    lm_eval.utils                       print intervals, floors and ceilings below lm-eval's table
    lm_eval.loggers.evaluation_tracker  write no secrets and no paths; write scores.parquet beside the results
    lm_eval.loggers.wandb_logger, trackio_logger   know that samples would be sent
    lm_eval._cli.run                    print no secrets
    lm_eval.config.evaluate_config      likewise, of a --config file
    lm_eval._cli.harness                print a UserError as one line, exit status 2

A failing patch prints one line and lm-eval goes on. MEDVLM_NO_AUTOLOAD=1 turns all of it off.
"""

import sys

TYPE_CHECKING = False  # typing's own costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

    Patch = Callable[[Any], None]

__all__ = ["autoload", "install", "is_active", "load_target", "model_targets", "scope", "tasks_folder"]


class _Scope:
    """Which tasks are indexed: lm-eval's own (not under `medvlm run`), and further folders of the user.

    Also the users' folders that were last indexed, and who is told of a finished run: called with lm-eval's results
    and its tracker. And what would send results or samples elsewhere, by the options that ask for it: the newest
    tracker to the Hub, and loggers.
    """

    builtin_tasks = True
    include_paths: "tuple[Path, ...]" = ()
    indexed: "tuple[Path, ...]" = ()
    finished: "Callable[[Any, Any], None] | None" = None
    hub_pushes: "tuple[str, ...]" = ()
    sample_loggers: "tuple[str, ...]" = ()


scope = _Scope()


def autoload() -> None:
    """Install the finder unless MEDVLM_NO_AUTOLOAD is set. Never raises."""
    os = sys.modules.get("os")  # site has imported it
    if os is not None and os.environ.get("MEDVLM_NO_AUTOLOAD", "") in ("", "0"):
        _install_finder()


def install() -> None:
    """Install the finder, and patch what is imported already: for notebooks, `medvlm` and `python -S`."""
    _install_finder()
    for name, patch in _PATCHES.items():
        if name in sys.modules:
            _apply(patch, sys.modules[name])


def is_active() -> bool:
    """Whether the finder is installed in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def _install_finder() -> None:
    if not is_active():
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules to patch through the other finders, and runs the patch after the module."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if name not in _PATCHES or name in self.busy:
            return None
        from importlib.util import find_spec

        self.busy.add(name)  # find_spec below asks this finder again
        try:
            spec = find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is not None and spec.loader is not None:
            _wrap_loader(spec.loader, _PATCHES[name])
        return spec


def _wrap_loader(loader: "Any", patch: "Patch") -> None:
    run = loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        module.__dict__.pop("__medvlm_patches__", None)  # a reload defines anew what was patched
        run(module)
        _apply(patch, module)

    loader.exec_module = exec_module


def _apply(patch: "Patch", module: "ModuleType") -> None:
    applied = module.__dict__.setdefault("__medvlm_patches__", set())
    if patch.__name__ in applied:
        return
    applied.add(patch.__name__)
    try:
        patch(module)
    except Exception as error:  # noqa: BLE001  # whatever a future lm-eval moves, lm-eval itself must go on
        sys.stderr.write(f"medvlm-harness: {patch.__name__} does not fit this lm-eval ({error!r}); going on without.\n")


def _register_models(module: "Any") -> None:
    from lm_eval.api import registry

    _register(registry, registry.model_registry, model_targets())


def _register_filters(module: "Any") -> None:
    from lm_eval.api import registry

    _register(registry, registry.filter_registry, _targets("lm_eval.filters"))


def _register(registry: "Any", names: "Any", targets: "dict[str, str]") -> None:
    if hasattr(registry, "load_plugins"):
        return  # a newer lm-eval reads our entry points itself
    for name, target in targets.items():
        if name not in names:
            names.register(name, target=target)


def model_targets() -> dict[str, str]:
    """Model name -> "module:class"."""
    return _targets("lm_eval.models")


def _targets(group: str) -> dict[str, str]:
    """Names of one group of our own entry points (another package's broken ones must not matter)."""
    from importlib.metadata import distribution

    points = distribution("medvlm-harness").entry_points
    return {point.name: point.value for point in points if point.group == group}


def load_target(target: str) -> "Any":
    """What "module:name" names, imported now."""
    from importlib import import_module

    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def tasks_folder() -> "Path":
    """The folder of the packaged task YAML."""
    from importlib.resources import files
    from pathlib import Path

    return Path(str(files("medvlm_harness.tasks")))


def _add_tasks(module: "Any") -> None:
    from functools import wraps
    from pathlib import Path

    index = module.TaskIndex
    build = index.build
    builtin = Path(str(sys.modules["lm_eval.tasks"].__file__)).parent  # its __init__ is running: we are in its import

    @wraps(build)
    def with_ours(paths: "Iterable[Any]", **options: "Any") -> "Any":
        from medvlm_harness.tracks.declarations import declared_names

        # One folder under two spellings would be indexed twice, and warn of each task that it overrides itself.
        given = {Path(path).resolve(): Path(path) for path in (*paths, *scope.include_paths)}
        ours = tasks_folder()
        users = [path for real, path in given.items() if real not in (builtin.resolve(), ours.resolve())]
        for folder in users:
            declared_names(folder)  # raises what is wrong with its files
        scope.indexed = tuple(users)
        defaults = builtin.resolve() in given
        first = [builtin] if defaults and scope.builtin_tasks else []
        first += [ours] if defaults or ours.resolve() in given else []
        return build([*first, *users], **options)  # later folders override: a user's task goes before ours

    index.build = staticmethod(with_ours)


def _wrap_evaluate(module: "Any") -> None:
    from functools import wraps

    from medvlm_harness.results.environment import EarlyReport

    evaluate = module.evaluate
    report = EarlyReport(module.add_env_info)

    @wraps(evaluate)
    def with_details(lm: "Any", task_dict: "Any", *args: "Any", **kwargs: "Any") -> "Any":
        from medvlm_harness.results.run import evaluate_with_details

        return evaluate_with_details(evaluate, report, lm, task_dict, *args, **kwargs)

    module.evaluate, module.add_env_info = with_details, report


def _own_stderr(module: "Any") -> None:
    stderr_for_metric = module.stderr_for_metric

    def ours_first(metric: "Any", bootstrap_iters: int) -> "Any":
        own = getattr(metric, "stderr", None)
        return own if callable(own) else stderr_for_metric(metric=metric, bootstrap_iters=bootstrap_iters)

    module.stderr_for_metric = ours_first


def _extend_table(module: "Any") -> None:
    from functools import wraps

    make_table = module.make_table

    @wraps(make_table)
    def with_intervals(result_dict: "Any", column: str = "results", *args: "Any", **options: "Any") -> str:
        table: str = make_table(result_dict, column, *args, **options)
        if column != "results" or "medvlm" not in result_dict:
            return table
        from medvlm_harness.results.table import interval_table

        return f"{table}\n{interval_table(result_dict['medvlm'])}"

    module.make_table = with_intervals


def _write_scores(module: "Any") -> None:
    from functools import wraps

    tracker = module.EvaluationTracker
    save, save_samples = tracker.save_results_aggregated, tracker.save_results_samples

    init = tracker.__init__

    @wraps(init)
    def noting_pushes(self: "Any", *args: "Any", **options: "Any") -> None:
        init(self, *args, **options)
        asked = [name for name in ("push_results_to_hub", "push_samples_to_hub") if getattr(self, name)]
        scope.hub_pushes = tuple(f"--hf_hub_log_args {name}" for name in asked)

    @wraps(save)
    def with_scores(self: "Any", results: "Any", samples: "Any" = None) -> None:
        self.is_medvlm = "medvlm" in results
        if self.output_path and self.is_medvlm:
            from medvlm_harness.results.redaction import redact
            from medvlm_harness.results.scores import finite, name_folder, write_beside_results

            name_folder(self, results)
            written = finite(redact(results))
            save(self, results=written, samples=samples)
            write_beside_results(self, written, getattr(results, "scores", ()))
        else:
            save(self, results=results, samples=samples)
        if scope.finished is not None:
            scope.finished(results, self)

    @wraps(save_samples)
    def without_secrets(self: "Any", task_name: str, samples: "Any") -> None:
        if not (self.output_path and getattr(self, "is_medvlm", False)):
            save_samples(self, task_name=task_name, samples=samples)
            return
        from medvlm_harness.results.manifest import record_files
        from medvlm_harness.results.redaction import redact_text
        from medvlm_harness.results.scores import results_file

        save_samples(self, task_name=task_name, samples=[redact_text(sample) for sample in samples])
        written = results_file(self)
        record_files(written, written.with_name(f"samples_{task_name}_{self.date_id}.jsonl"))

    tracker.__init__ = noting_pushes
    tracker.save_results_aggregated, tracker.save_results_samples = with_scores, without_secrets


def _note_sample_loggers(module: "Any") -> None:
    """W&B and Trackio get the samples of a run with --log_samples."""
    from functools import wraps

    for name, option in (("WandbLogger", "--wandb_args"), ("TrackioLogger", "--trackio_args")):
        if (logger := getattr(module, name, None)) is None or logger.__module__ != module.__name__:
            continue
        init = logger.__init__

        @wraps(init)
        def noting(self: "Any", *args: "Any", init: "Any" = init, option: str = option, **options: "Any") -> None:
            scope.sample_loggers = (*scope.sample_loggers, f"{option} with --log_samples")
            init(self, *args, **options)

        logger.__init__ = noting


def _print_no_secrets(module: "Any") -> None:
    """What lm-eval prints and logs of --model_args goes to the log files of clusters."""
    import builtins
    import logging

    from medvlm_harness.results.redaction import without_secrets

    def redacted(*values: "Any", **options: "Any") -> None:
        builtins.print(*(without_secrets(str(value)) for value in values), **options)  # noqa: T201  # lm-eval does

    def redact_record(record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True

    module.print = redacted
    for name in ("lm_eval.evaluator", module.__name__):
        logging.getLogger(name).addFilter(redact_record)


def _one_line_errors(module: "Any") -> None:
    from functools import wraps

    execute = module.HarnessCLI.execute

    @wraps(execute)
    def with_one_line(self: "Any", args: "Any") -> None:
        from medvlm_harness.errors import UserError

        try:
            execute(self, args)
        except ValueError as error:
            import os

            message = str(error) if isinstance(error, UserError) else _misspelt(str(error))
            if message is None or os.environ.get("MEDVLM_DEBUG", "") not in ("", "0"):
                raise
            sys.stderr.write(f"error: {message}\n")
            sys.exit(2)

    module.HarnessCLI.execute = with_one_line


def _misspelt(message: str) -> "str | None":
    """What lm-eval's error on an unknown name means if that is nearly one of ours; None if it is not our business."""
    from medvlm_harness.errors import near_matches
    from medvlm_harness.tracks.declarations import declared_names, declared_tags

    for start, what, names in (
        ("Tasks not found: ", "task", lambda: (*declared_names(tasks_folder()), *declared_tags(tasks_folder()))),
        ("Attempted to load model '", "model", model_targets),
    ):
        if message.startswith(start):
            name = message.removeprefix(start).partition("'")[0].partition(",")[0]
            meant = near_matches(name, names())
            return f"Unknown {what} {name!r}.{meant}" if "Did you mean" in meant else None
    return None


_PATCHES = {
    "lm_eval.models": _register_models,
    "lm_eval.filters": _register_filters,
    "lm_eval.tasks._index": _add_tasks,
    "lm_eval.evaluator": _wrap_evaluate,
    "lm_eval.evaluator_utils": _own_stderr,
    "lm_eval.utils": _extend_table,
    "lm_eval.loggers.evaluation_tracker": _write_scores,
    "lm_eval.loggers.wandb_logger": _note_sample_loggers,
    "lm_eval.loggers.trackio_logger": _note_sample_loggers,
    "lm_eval._cli.run": _print_no_secrets,
    "lm_eval.config.evaluate_config": _print_no_secrets,
    "lm_eval._cli.harness": _one_line_errors,
}
