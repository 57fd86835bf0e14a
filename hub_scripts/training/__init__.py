"""What pre-training is made of; `hub_scripts/train.py` puts it together."""
