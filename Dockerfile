FROM rust:1.95.0-slim-bookworm AS build
# The allocator and the TLS are built from C, with the compiler that is there.
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# The dependencies alone first: this layer stays while only the sources change. Cargo wants a file for
# each target that Cargo.toml names, and builds no dependencies of a build script that is not there.
COPY Cargo.toml Cargo.lock ./
# Some arm64 kernels have pages of 64 KiB, which the allocator has to know.
RUN case "$(uname -m)" in aarch64) export JEMALLOC_SYS_WITH_LG_PAGE=16 ;; esac \
    && mkdir src benches && echo 'fn main() {}' | tee src/main.rs > build.rs && touch src/lib.rs benches/pure.rs \
    && cargo build --release --locked --bin omotes-orchestrator \
    && rm -rf src target/release/.fingerprint/omotes-orchestrator-*
COPY Cargo.toml build.rs ./
COPY migrations migrations
COPY src src
# Which commit this is: `docker build --build-arg COMMIT=$(git describe --always --dirty --tags) .`
ARG COMMIT=
RUN export OMOTES_COMMIT="$COMMIT" \
    && case "$(uname -m)" in aarch64) export JEMALLOC_SYS_WITH_LG_PAGE=16 ;; esac \
    && cargo build --release --locked --bin omotes-orchestrator \
    # Halves it; stack traces read compressed line tables just as well.
    && objcopy --compress-debug-sections=zlib target/release/omotes-orchestrator

FROM debian:12.12-slim
LABEL org.opencontainers.image.title="omotes-orchestrator" \
      org.opencontainers.image.description="Job orchestrator of the OMOTES heat-network toolkit" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
# The authorities that are trusted where no others are given; a file alone, without openssl and apt's traces.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
RUN useradd --system --no-create-home --shell /usr/sbin/nologin orchestrator
COPY --from=build /build/target/release/omotes-orchestrator /usr/local/bin/
# A file mounted over this one is all that a deployment needs.
COPY config /config
ENV WORKFLOW_CONFIG_PATH=/config/workflow_config.json \
    HTTP_BIND=0.0.0.0:8080 \
    RUST_BACKTRACE=1
EXPOSE 8080
USER orchestrator
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s CMD ["omotes-orchestrator", "healthcheck"]
ENTRYPOINT ["omotes-orchestrator"]
CMD ["run"]
