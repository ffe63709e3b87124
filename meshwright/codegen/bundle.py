def verify_bundle(d):
    return []
