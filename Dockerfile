# fct with its CUDA kernels. Build: docker build -t fct .   Run: docker run --gpus all fct info
# The compiler stays in the first stage; the second needs no CUDA toolkit, only torch's own CUDA libraries and a driver.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /venv && FCT_CUDA=on /venv/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
ENV PATH=/venv/bin:$PATH
ENTRYPOINT ["fct"]
CMD ["info"]
