"""Results of all seeds to a significance test, figures and pages."""
