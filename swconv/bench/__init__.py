"""The operator's speed against its rivals: `python -m swconv bench operator`. Needs torch, torchvision, timm and numpy."""
