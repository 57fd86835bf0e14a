"""Commands that meet files, the Hub, Accelerate and plots."""
