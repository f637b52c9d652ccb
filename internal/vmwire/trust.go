package vmwire

// States of Secure Boot.
const (
	SecureBootOn   = "on"
	SecureBootOff  = "off"
	SecureBootNone = "none" // the firmware has none: BIOS, or no firmware at all
)

// Trust says how the machine is protected from who can touch its disk.
type Trust struct {
	// SecureBoot is on, off or none.
	SecureBoot string `json:"secureBoot"`
	// Chain is who vouches for the kernel while Secure Boot is on: debian, or owner.
	Chain string `json:"chain,omitempty"`
	// Verity says whether the root is checked while it is read.
	Verity bool `json:"verity"`
	// TPM says whether there is one.
	TPM bool `json:"tpm"`
	// Encrypted says whether what is kept is; OpenedBy is how it was opened: tpm2,
	// passphrase or recovery.
	Encrypted bool   `json:"encrypted"`
	OpenedBy  string `json:"openedBy,omitempty"`
	// PCRs are the registers that the key is sealed to.
	PCRs []int `json:"pcrs,omitempty"`
	// RecoveryKey tells that a key was made in this boot and can be fetched still.
	RecoveryKey bool `json:"recoveryKey,omitempty"`
}

// Recovery is the answer to GET /v1/encryption/recovery.
type Recovery struct {
	Key string `json:"key"`
}

// Unlock is the body of POST /v1/encryption/unlock: a recovery key or a passphrase.
type Unlock struct {
	Key string `json:"key"`
}
