"""The bundle of code that is shipped beside an artifact."""
