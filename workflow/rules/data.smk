# The images of a profile, with a manifest (path, size, sha256). For paper: the user's folder, checked.
DATA = "artifacts/{profile}/data"


rule data:
    output:
        data=f"{DATA}/data.json",
        manifest=f"{DATA}/manifest.csv",
    params:
        dataset=dataset,
        code=fingerprint("swconv.training.manifest"),
        out=subpath(output.data, parent=True),
    log:
        "logs/data/{profile}.log",
    shell:
        "{PYTHON:q} -m swconv data --profile {wildcards.profile} --out {params.out} 2>&1 | tee {log}"
