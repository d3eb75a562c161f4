import os, pytest
@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    os.environ["MLFLOW_TRACKING_URI"]="http://127.0.0.1:15777"
    root = tmp_path_factory.mktemp("root")
    os.environ["VIT_ROOT"]=str(root)
    yield root
