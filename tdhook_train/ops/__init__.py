"""Pure tensor functions: folds and shifts, ridge regression by statistics, quadrature, fingerprints."""
