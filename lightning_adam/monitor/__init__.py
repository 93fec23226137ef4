"""`AdamMonitor`: measures Adam during training, and logs the statistics and findings."""
