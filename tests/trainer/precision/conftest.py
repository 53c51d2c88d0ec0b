"""What tests of whole runs with formats share."""

from tests.runs.conftest import brief_measurement, corpus, settings_of_torch

__all__ = ["brief_measurement", "corpus", "settings_of_torch"]
