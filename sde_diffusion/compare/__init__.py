"""Predictors and correctors against each other at equal numbers of evaluations, on targets that are known exactly.

``targets`` (what is sampled), ``arms`` (how), ``measures`` (how well), ``stationarity`` (what chains alone
do), ``study`` (all of it, resumable), ``ranking`` and ``verdicts`` (what the results say),
``figures`` and ``page`` (the report).
"""

from sde_diffusion.compare.arms import Arm, plan, run_arm
from sde_diffusion.compare.page import write_page
from sde_diffusion.compare.study import Settings, run_study
from sde_diffusion.compare.targets import TARGETS, Target, target
from sde_diffusion.compare.verdicts import answers, statements
