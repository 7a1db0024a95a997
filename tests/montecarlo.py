"""Comparisons of draws with what theory says."""


def assert_mean(draws, expected, sigmas=5.0):
    """Compares the mean of independent draws with its expectation.

    Each comparison fails by chance about once in 1.7 million (5 standard errors of a normal mean).
    """
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    excess = (draws.mean(dim=0) - expected).abs() - sigmas * standard_error
    assert (excess <= 1e-12).all(), f"off by {excess.max():.3g} over {sigmas} standard errors"
