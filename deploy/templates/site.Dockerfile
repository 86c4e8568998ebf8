# The hospital's program, in the versions of constraints.txt. Its kit, keys and data are not in the image.
FROM python:3.11-slim-bookworm
WORKDIR /install
COPY @DOCKER_COPY@ ./
RUN pip install --no-cache-dir --constraint constraints.txt '@INSTALL_HOSPITAL@' \
    && useradd --uid 10001 --create-home fedmedgan
USER 10001
WORKDIR /var/lib/fedmedgan
ENTRYPOINT ["fedmedgan"]
CMD ["site", "start", "--home", "/var/lib/fedmedgan"]
