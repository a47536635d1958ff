// Without a look at the status, the path may be null: this must not compile.
import type { Response } from "./response";

export const path = (response: Response): string => response.latent_file_path;
