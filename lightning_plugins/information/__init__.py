"""Mutual information of representations, estimated after training: critics, their fit, evaluation, and baselines."""

from lightning_plugins.information.baselines import cca_information, ksg_information
from lightning_plugins.information.critics import Critic
from lightning_plugins.information.estimates import estimate, estimate_information, evaluate_critic
from lightning_plugins.information.fitting import CriticSettings, FittedCritic, fit_critic
from lightning_plugins.information.posterior import ClassProbe, class_information, fit_class_probe
from lightning_plugins.information.readings import EstimateSettings, MutualInformationEstimate

__all__ = [
    "ClassProbe",
    "Critic",
    "CriticSettings",
    "EstimateSettings",
    "FittedCritic",
    "MutualInformationEstimate",
    "cca_information",
    "class_information",
    "estimate",
    "estimate_information",
    "evaluate_critic",
    "fit_class_probe",
    "fit_critic",
    "ksg_information",
]
