#!/usr/bin/env bash
# Prefect 3.9.1: the server checks a deployment's parameter schema anew for every flow run, which costs far more than
# checking the parameters.
#
# One would have guessed: whether a schema is a schema is found out when the deployment is made, and a new run costs the
# check of its own parameters. But each run with enforce_parameter_schema (the default) goes through jsonschema.validate,
# which first checks the schema against its meta-schema. With a pydantic model of a few hundred settings, which is what a
# training pipeline has, that is more than nine tenths of the time, in the server's one event loop.
#
# Whom it hurts: flows with one large pydantic model as their parameter. Each new run, also one from a schedule or the UI,
# keeps the server from answering workers and running flows meanwhile: hundreds of submissions are minutes of it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check prefect==3.9.1
export PREFECT_HOME="$folder/home" PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
cat > "$folder/run.py" <<'PY'
import statistics, time
from importlib.metadata import version
from prefect import flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validation
from pydantic import Field, create_model

sections = {
    f"section_{i}": (create_model(f"Section{i}", **{
        f"setting_{j}": (float, Field(default=0.5, ge=0, le=1, description="A setting.")) for j in range(20)
    }), ...) for i in range(20)
}
Config = create_model("Config", **sections)

@flow
def train(config: Config): ...

schema = parameter_schema(train).model_dump_for_openapi()
parameters = {"config": {name: {} for name in sections}}
checked, check = [], validation._VALIDATOR.check_schema

def seconds():
    found = []
    for _ in range(5):
        began = time.process_time()
        validation.validate(parameters, schema, raise_on_error=True, ignore_required=True)
        found.append(time.process_time() - began)
    return statistics.median(found)

def counted(*arguments, **options):
    checked.append(1)
    check(*arguments, **options)

as_it_is = seconds()
validation._VALIDATOR.check_schema = staticmethod(counted)
seconds()
validation._VALIDATOR.check_schema = staticmethod(lambda *arguments, **options: None)
without = seconds()
print(f"prefect {version('prefect')}, jsonschema {version('jsonschema')}, 400 settings")
print(f"a flow run's parameters are checked in {1000 * as_it_is:.0f} ms, "
      f"{1000 * without:.0f} ms where the schema is not checked again")
print(f"5 times the same schema: checked {len(checked)} times")
assert len(checked) == 5
assert as_it_is > 5 * without
PY
cd "$folder" && venv/bin/python run.py
