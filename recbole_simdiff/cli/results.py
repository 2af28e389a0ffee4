"""Output of a result, as several commands print it."""

from recbole_simdiff.pipelines import report
from recbole_simdiff.runs.result import RunResult, format_table


def print_folder(result: RunResult) -> None:
    """Print the folder of a run's files."""
    print(f"checkpoints and result.json: {result.run_dir}")


def print_result(result: RunResult) -> None:
    """Print the tables of a run: its metrics, and what its method measures besides."""
    epoch = f"best epoch {result.best_epoch}, last {result.epochs - 1}"
    if result.best_epoch is None:
        epoch = f"no validation data, the last of {result.epochs} epochs"
    print(
        f"\n{result.config['model']} on {result.config['dataset']}: {epoch}, "
        f"{result.seconds:.0f} s of training, peak memory {result.peak_memory_mb / 1024:.2f} GiB"
        + (f", on the GPU {gpu / 1024:.2f} GiB" if (gpu := result.peak_gpu_memory_mb) else "")
    )
    print(result.table())
    if result.sampling:
        seeds = result.sampling["seeds"]
        metrics = {n: v for n, v in result.sampling.items() if n != "seeds"}
        rows = {k: {n: v[k] for n, v in metrics.items()} for k in ("mean", "std")}
        print(f"\ntest, {next(iter(result.test))}, over sampling seeds {seeds[0]}..{seeds[-1]}")
        print(format_table({"test": rows}, result.digits))
    if result.augmentation:
        notes = result.augmentation
        if result.test and "baseline" in notes:
            print(f"\ntest of {notes['backbone']} by input length, without and with augmentation")
            print(report.format_report(result))
        if "quality" in notes:
            print(f"\n{report.format_quality(notes['quality'])}")
