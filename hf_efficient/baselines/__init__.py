"""The cheap ways that a user would try first, made from the same rows and the same teacher (`table.BASELINES`)."""
