// Package seal keeps a secret with a TPM 2.0: the chip gives it out only while
// its registers (PCRs) have the values that they had when it was sealed. What a
// machine started from is in those registers, so a changed system cannot have the secret.
//
// The work is done in a program of its own, cloudos-seal, which the first process runs and
// asks over standard input and output: this file is what they say to each other, and
// all that the first process links; package tpm has the rest.
package seal

// Program is where it is.
const Program = "/bin/cloudos-seal"

// Operations.
const (
	Seal   = "seal"   // Secret to PCRs: Sealed
	Unseal = "unseal" // Sealed: Secret
	Cap    = "cap"    // add to PCR: what is sealed to it is closed until the next start
)

// Request is one line of JSON.
type Request struct {
	Op   string `json:"op"`
	PCRs []int  `json:"pcrs,omitempty"`
	// Values are what the registers will have when the secret is given out; without them, what they have now.
	Values [][]byte `json:"values,omitempty"`
	Secret []byte   `json:"secret,omitempty"`
	Sealed *Sealed  `json:"sealed,omitempty"`
}

// Response is one too; what goes wrong is text and an exit status.
type Response struct {
	Secret []byte  `json:"secret,omitempty"`
	Sealed *Sealed `json:"sealed,omitempty"`
}

// Sealed is a secret that the TPM alone can open. It is no secret itself.
type Sealed struct {
	PCRs []int `json:"pcrs"`
	// Values are those of the PCRs (SHA-256), to tell which one changed.
	Values  [][]byte `json:"values"`
	Public  []byte   `json:"public"`
	Private []byte   `json:"private"`
}

// Bank is the algorithm of the registers, as the kernel names it.
const Bank = "sha256"

// Means says what a register is about.
func Means(pcr int) string {
	switch pcr {
	case 0, 1, 2, 3:
		return "the firmware and its settings"
	case 4:
		return "the boot loaders and the kernel"
	case 5:
		return "the partition table"
	case 7:
		return "Secure Boot and its keys"
	case 8:
		return "the boot loader's commands and the kernel's command line"
	case 9:
		return "the files that the boot loader read: kernel and initial file system"
	case 11:
		return "the unified kernel image"
	case 12, 13:
		return "what was given to the unified kernel image"
	}
	return "another part of the start"
}
