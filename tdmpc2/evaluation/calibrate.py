"""Calibration: how far refining looks ahead, and when the monitor gives a plan up."""

from dataclasses import replace
from pathlib import Path

from ..config import SpeculationConfig
from ..monitor import calibrate_thresholds
from ..workers import Workers
from .config import EvaluationConfig
from .modes import ALONE, DISTILLED, PRIOR, Family, families, simple_modes
from .runs import Subject, execute, kept, runs_of, write_csv

REFINING_LOSS = 0.01  # of the return, that refining by a single step may cost


def calibrate(
    subject: Subject, config: EvaluationConfig, out: Path, workers: Workers
) -> dict[str, SpeculationConfig]:
    """All modes, the baseline first, with thresholds from episodes without fallback on the calibration seeds.

    One run of a family, at its longest execution horizon, holds the mismatches of the shorter ones: those at
    their steps in plan. Refining looks a single step ahead, or as far as plans do where a single step costs
    more than `REFINING_LOSS` of the mean return.

    Args:
        subject: a teacher and its correctors.
        config: seeds and quantile.
        out: folder of the results, kept in `out/free`.
        workers: run the episodes.
    """
    planner = subject.teacher.planner
    modes = simple_modes(planner.iterations)
    variants: dict[Family, dict[int, str]] = {}  # the steps ahead that are tried, and the names of their runs
    free: dict[str, SpeculationConfig] = {}
    compared = families(list(subject.correctors), config.horizons)
    for family in compared:
        if not (family.horizons or family.refined):  # nothing to calibrate
            continue
        mode = ALONE
        if family.horizons:
            mode = SpeculationConfig(max(family.horizons), corrector=family.corrector)
        ahead = dict.fromkeys([1, planner.horizon]) if family.refined else [0]
        variants[family] = {n: family.name + (f"_{n}" if family.refined else "") for n in ahead}
        free |= {name: replace(mode, refine_steps=n) for n, name in variants[family].items()}
    runs = runs_of(subject, free, config.calibration_seeds, config.num_envs, out / "free")
    execute(runs, "calibration", workers)
    write_csv(out / "free" / "episodes.csv", kept(runs).episodes)
    results = {name: run.kept() for name, run in runs.items()}
    for family in compared:
        if family not in variants:
            modes[DISTILLED] = ALONE
            continue
        returns = {n: results[name].episodes["return"].mean() for n, name in variants[family].items()}
        most = max(returns.values())
        name = variants[family][min(n for n in returns if returns[n] >= most - REFINING_LOSS * abs(most))]
        if not family.horizons:
            modes[family.name] = free[name]
        for horizon in family.horizons:
            thresholds = calibrate_thresholds(results[name].steps, config.quantile, horizon)
            modes[family.mode_name(horizon)] = replace(
                free[name], execution_horizon=horizon, threshold=thresholds
            )
    return {**modes, "prior": PRIOR}
