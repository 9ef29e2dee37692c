# fct with its CUDA kernels, for fitting and mapping. Build: docker build -t fct .   Run: docker run --gpus all fct info
# A worker that maps on processors, without torch: docker build --target worker -t fct-worker .
# The CUDA toolkit stays in its stage; the last has torch's own CUDA libraries, and the C compiler and Python headers with
# which Triton builds its launcher when its first kernel runs. The driver comes from the host.
FROM ubuntu:24.04 AS build-worker
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /venv && FCT_CUDA=off /venv/bin/pip wheel --no-deps --wheel-dir /wheels .

# EXTRAS: what the galleries need, as --build-arg EXTRAS=[s3,postgres].
FROM ubuntu:24.04 AS worker
ARG EXTRAS=
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker /wheels /wheels
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir "$(ls /wheels/*.whl)$EXTRAS" && rm -r /wheels
ENV PATH=/venv/bin:$PATH
ENTRYPOINT ["fct"]
CMD ["info"]

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /venv && FCT_CUDA=on /venv/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir "$(ls /wheels/*.whl)[train]" && rm -r /wheels
ENV PATH=/venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["fct"]
CMD ["info"]
