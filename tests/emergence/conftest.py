import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def autoregressive():
    """Draw noise of variance 1 with a first-order autocorrelation: [tick, series]."""

    def draw(rng, ticks, series, rho):
        noise = np.empty((ticks, series))
        noise[0] = rng.standard_normal(series)
        for at in range(1, ticks):
            noise[at] = rho * noise[at - 1] + np.sqrt(1 - rho**2) * rng.standard_normal(series)
        return noise

    return draw


@pytest.fixture
def sigmoids():
    """Plant sigmoids in decades of steps, with noise: [tick, series]."""

    def plant(rng, steps, onsets, width, noise):
        decades = np.log10(np.maximum(steps, 1e-6))[:, None] - np.log10(onsets)
        clean = 1 / (1 + np.exp(np.clip(-decades / width, -500, 500)))
        return clean + noise * rng.standard_normal(clean.shape)

    return plant
