package engine

import "github.com/cloudos-io/cloudos/api"

// Secrets is what the engine needs of package secret.
type Secrets interface {
	Create(k api.SecretKind, spec api.SecretSpec) (api.Secret, error)
	List(k api.SecretKind) []api.Secret
	Inspect(k api.SecretKind, ref string) (api.Secret, error)
	Update(k api.SecretKind, ref string, spec api.SecretSpec) (api.Secret, error)
	Remove(k api.SecretKind, ref string) error
	// Reveal opens a value.
	Reveal(k api.SecretKind, ref string) ([]byte, api.Secret, error)
	Unlock(passphrase string) error
	Lock() error
	Rekey(passphrase string) error
}
