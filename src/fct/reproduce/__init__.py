"""Whole experiments from one YAML file: old model, side-information, new model, BCT, h, table."""

from fct.reproduce.experiment import Experiment, experiment_names, load_experiment
from fct.reproduce.run import run_experiment

__all__ = ["Experiment", "experiment_names", "load_experiment", "run_experiment"]
