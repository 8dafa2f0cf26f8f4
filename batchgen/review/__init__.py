"""Looking at runs: forecast (plan), replay (verify), report and doctor."""
