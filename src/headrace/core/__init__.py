"""What every room speaks: types, specs, configuration, errors. Standard library only."""
