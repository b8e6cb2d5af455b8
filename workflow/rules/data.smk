# The images of a profile, with a manifest (path, size, sha256). For paper: the user's folder, checked. Who reads them takes
# data.json as ancient and the manifest's digest by content: where the images lie is no reason to train again.
DATA = "artifacts/{profile}/data"


rule data:
    output:
        data=f"{DATA}/data.json",
        manifest=f"{DATA}/manifest.csv",
        digest=f"{DATA}/manifest.csv.sha256",
    params:
        dataset=dataset,
        code=fingerprint("swconv.training.reduced"),
        out=subpath(output.data, parent=True),
    log:
        "logs/data/{profile}.log",
    shell:
        "python -m swconv data --profile {wildcards.profile} --out {params.out} 2>&1 | tee {log}"
