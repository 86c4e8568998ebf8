# The coordinator's program: no torch, and nothing that could open an update.
FROM python:3.11-slim-bookworm
WORKDIR /install
COPY @DOCKER_COPY@ ./
RUN pip install --no-cache-dir --constraint constraints.txt '@INSTALL_SERVER@' \
    && useradd --uid 10001 --create-home fedmedgan
USER 10001
WORKDIR /var/lib/fedmedgan-coordinator
ENTRYPOINT ["fedmedgan"]
CMD ["server", "start", "--folder", "/var/lib/fedmedgan-coordinator"]
