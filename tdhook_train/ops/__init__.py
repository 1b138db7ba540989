"""Pure tensor functions: folds and shifts, ridge and logistic regression, quadrature, fingerprints."""
