// Where an image comes from: a file, a drop, the clipboard, a camera.

const byId = (id) => document.getElementById(id);

/** Calls `take` with a file and a name each time that the visitor gives an image. */
export function takeImages(take, complain) {
  const takeFrom = (files) => {
    const file = [...files].find((candidate) => candidate.type.startsWith("image/"));
    if (file) take(file, file.name);
    else if (files.length) complain("That is not an image: choose a JPEG, PNG or WebP file.");
  };
  byId("file").addEventListener("change", (event) => {
    takeFrom(event.target.files);
    event.target.value = ""; // so that choosing the same file again counts
  });
  document.addEventListener("paste", (event) => takeFrom(event.clipboardData.files));
  takeDrops(takeFrom);
  takePhotos(take, complain);
}

function takeDrops(takeFrom) {
  // The whole page takes drops: a file that misses the frame would otherwise replace the page.
  const mark = (on) => byId("drop").classList.toggle("over", on);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", () => mark(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(false);
    takeFrom(event.dataTransfer.files);
  });
}

function takePhotos(take, complain) {
  const video = byId("video");
  const close = () => {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    byId("camera").hidden = true;
    byId("photograph").focus();
  };
  byId("photograph").addEventListener("click", () => open(video).catch(() => complain(NO_CAMERA)));
  byId("close-camera").addEventListener("click", close);
  byId("shoot").addEventListener("click", async () => {
    take(await picture(video), "photo.jpg");
    close();
  });
}

const NO_CAMERA =
  "The camera cannot be used: allow it, and open this page over HTTPS or on localhost, where browsers give cameras out.";

async function open(video) {
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  await video.play(); // before that there is no picture to use
  byId("camera").hidden = false;
  byId("shoot").focus();
}

function picture(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}
