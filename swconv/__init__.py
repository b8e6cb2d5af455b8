"""ShiftwiseConv and SLaK, reproducibly: operator, models, training and reports.

`import swconv` is light; `import swconv.ops` needs torch, `import swconv.models` registers the models with timm.
"""

__version__ = "0.1.0"
