"""Whole experiments from one YAML file: old model, side-information, new model, BCT, h, table."""

from fct.life.experiment import Experiment, experiment_names, load_experiment
from fct.life.reproduce import run_experiment

__all__ = ["Experiment", "experiment_names", "load_experiment", "run_experiment"]
