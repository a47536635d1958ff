// A consumer of the generated types: the compiler knows the fields of each outcome by its status.
import type { EncodeRequest } from "./request";
import type { Response } from "./response";

export const request: EncodeRequest = { image_path: "/data/photo.jpg", latent_format: "safetensors", megapixels: null };

export function latentOf(response: Response): { path: string; mean: number[] } {
  if (response.status === "error") {
    const code: string = response.error_code;
    const nothing: null = response.latent_file_path;
    throw new Error(`${code}: ${response.error_message} ${nothing}`);
  }
  const [, channels]: [number, number, number, number] = response.latent_shape;
  const preview: string | undefined = response.preview_path;
  console.log(channels, preview, response.metadata.latent_sha256.length);
  return { path: response.latent_file_path, mean: response.metadata.latent_statistics?.mean ?? [] };
}
