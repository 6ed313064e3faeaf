# Stands in for the official postgres image, where no registry can be reached: Debian's server with the same variables.
ARG BASE
FROM ${BASE}
ARG DEBIAN_FRONTEND=noninteractive
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends postgresql \
    && install --directory --owner=postgres --group=postgres /var/lib/postgresql/data \
    && ln -s /usr/lib/postgresql/*/bin /opt/postgresql
COPY --chmod=755 postgres-entrypoint /usr/local/bin/
ENV PATH=/opt/postgresql:$PATH LC_ALL=C.UTF-8
USER postgres
STOPSIGNAL SIGINT
ENTRYPOINT ["postgres-entrypoint"]
