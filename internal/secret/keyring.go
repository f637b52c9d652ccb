package secret

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/scrypt"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

var errLocked = fault.New(fault.Unavailable, "the secrets are locked: give their passphrase with 'servin secrets unlock'")

const ringFile = "keyring.json"

// keyring is the file of wrapped data keys.
type keyring struct {
	Version int
	// KDF is set where the master key comes from a passphrase; Master is then "".
	// Else Master names the key in the key file.
	KDF     *kdf   `json:",omitempty"`
	Master  string `json:",omitempty"`
	Current string
	Wrapped map[string][]byte // data keys by id

	keys map[string][]byte // open ones; nil while locked
}

type kdf struct {
	Salt    []byte
	N, R, P int
}

// Parameters of scrypt: about a second and 128 MiB would be felt by a small host
// at each start; 32 MiB is what OWASP asks for at least.
const scryptN, scryptR, scryptP = 1 << 15, 8, 3

func (k *kdf) derive(passphrase string) ([]byte, error) {
	if k.N > 1<<20 || k.N < 2 || k.R < 1 || k.R > 32 || k.P < 1 || k.P > 16 {
		return nil, fault.New(fault.Internal, "the keyring asks for a derivation that is out of bounds")
	}
	return scrypt.Key([]byte(passphrase), k.Salt, k.N, k.R, k.P, chacha20poly1305.KeySize)
}

func (k *keyring) locked() bool { return k.keys == nil }

func keyName(key []byte) string {
	sum := sha256.Sum256(append([]byte("servin secrets master key\x00"), key...))
	return hex.EncodeToString(sum[:8])
}

func wrap(master, key []byte, id string) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(master)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce)
	return aead.Seal(nonce, nonce, key, []byte("data key "+id)), nil
}

func unwrap(master, b []byte, id string) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(master)
	if err != nil {
		return nil, err
	}
	if len(b) < aead.NonceSize() {
		return nil, errors.New("it is too short")
	}
	return aead.Open(nil, b[:aead.NonceSize()], b[aead.NonceSize():], []byte("data key "+id))
}

// open unwraps every data key.
func (k *keyring) open(master []byte) error {
	keys := map[string][]byte{}
	for id, b := range k.Wrapped {
		key, err := unwrap(master, b, id)
		if err != nil {
			return err
		}
		keys[id] = key
	}
	if keys[k.Current] == nil {
		return errors.New("its current key is missing")
	}
	k.keys = keys
	return nil
}

func newKey() (id string, key []byte) {
	b := make([]byte, 8+chacha20poly1305.KeySize)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b[:8]), b[8:]
}

// loadRing reads the keyring and opens it where that takes no passphrase.
func (s *Store) loadRing() (*keyring, error) {
	b, err := readFile(filepath.Join(s.c.Dir, ringFile))
	if errors.Is(err, os.ErrNotExist) {
		if len(s.items) > 0 {
			return nil, fault.New(fault.Internal, "cannot open the secrets: %s is missing; put it back from a backup, or move %s away to begin anew", ringFile, s.c.Dir)
		}
		return nil, nil
	}
	k := new(keyring)
	if err == nil {
		err = json.Unmarshal(b, k)
	}
	if err == nil && k.Version != 1 {
		err = errors.New("it is of a version that this engine does not know")
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the keyring of the secrets: %w", err)
	}
	if k.KDF != nil {
		return k, nil
	}
	// A change of the key may have been cut short: the new file counts if the
	// keyring names it.
	for _, path := range []string{s.c.KeyFile, s.c.KeyFile + ".new"} {
		text, err := readSecretFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fault.New(fault.Of(err), "cannot read the key of the secrets: %w", err)
		}
		master, err := hex.DecodeString(text)
		if err != nil || len(master) != chacha20poly1305.KeySize || keyName(master) != k.Master {
			continue
		}
		if err := k.open(master); err != nil {
			return nil, fault.New(fault.Internal, "cannot open the keyring of the secrets: it is damaged")
		}
		if path != s.c.KeyFile {
			if err := os.Rename(path, s.c.KeyFile); err != nil {
				return nil, fault.New(fault.Internal, "cannot put the new key of the secrets in place: %w", err)
			}
		}
		return k, nil
	}
	return nil, fault.New(fault.Internal, "cannot open the secrets: %s does not hold their key; put it back, or move %s away to begin anew", s.c.KeyFile, s.c.Dir)
}

// newRing begins a store: with the passphrase of the file, or a key file.
func (s *Store) newRing() error {
	passphrase := ""
	if s.c.PassphraseFile != "" {
		var err error
		if passphrase, err = readSecretFile(s.c.PassphraseFile); err != nil {
			return fault.New(fault.Of(err), "cannot read the passphrase of the secrets: %w", err)
		}
		if passphrase == "" {
			return fault.New(fault.Invalid, "cannot use an empty passphrase for the secrets")
		}
	}
	id, key := newKey()
	k := &keyring{Version: 1, Current: id, keys: map[string][]byte{id: key}}
	return s.keep(k, passphrase)
}

// keep wraps a ring's keys under a new master key, stores that and the ring, in an
// order in which a kill leaves what opens, and makes it the store's.
func (s *Store) keep(k *keyring, passphrase string) error {
	fail := func(err error) error {
		return fault.New(fault.Of(err), "cannot store the keys of the secrets: %w", err)
	}
	if err := os.MkdirAll(s.c.Dir, 0o700); err != nil {
		return fail(err)
	}
	var master []byte
	k.KDF, k.Master, k.Wrapped = nil, "", map[string][]byte{}
	if passphrase != "" {
		k.KDF = &kdf{Salt: make([]byte, 16), N: s.work, R: scryptR, P: scryptP}
		_, _ = rand.Read(k.KDF.Salt)
		var err error
		if master, err = k.KDF.derive(passphrase); err != nil {
			return fail(err)
		}
	} else {
		_, master = newKey()
		k.Master = keyName(master)
		if err := s.write(s.c.KeyFile+".new", []byte(hex.EncodeToString(master)+"\n")); err != nil {
			return fail(err)
		}
	}
	for id, key := range k.keys {
		b, err := wrap(master, key, id)
		if err != nil {
			return fail(err)
		}
		k.Wrapped[id] = b
	}
	b, err := json.Marshal(k)
	if err == nil {
		err = s.write(filepath.Join(s.c.Dir, ringFile), b)
	}
	if err != nil {
		return fail(err)
	}
	s.ring = k
	if err = s.next(); err != nil {
		return fail(err)
	}
	if passphrase == "" {
		err = os.Rename(s.c.KeyFile+".new", s.c.KeyFile)
	} else if err = os.Remove(s.c.KeyFile); errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(s.c.KeyFile))
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// Locked tells whether a passphrase is needed.
func (s *Store) Locked() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.ring != nil && s.ring.locked()
}

// Unlock opens the store with its passphrase.
func (s *Store) Unlock(passphrase string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring == nil || s.ring.KDF == nil {
		return fault.New(fault.Conflict, "the secrets are not locked with a passphrase")
	}
	master, err := s.ring.KDF.derive(passphrase)
	if err != nil {
		return err
	}
	k := *s.ring
	if err := k.open(master); err != nil {
		return fault.New(fault.Forbidden, "the passphrase does not open the secrets")
	}
	s.ring = &k
	return nil
}

// Lock forgets the keys of a store that has a passphrase.
func (s *Store) Lock() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring == nil || s.ring.KDF == nil {
		return fault.New(fault.Conflict, "the secrets have no passphrase: set one with 'servin secrets rotate-key --passphrase' first")
	}
	k := *s.ring
	for _, key := range k.keys {
		clear(key)
	}
	k.keys = nil
	s.ring = &k
	return nil
}

// Rekey makes a new master key (of the passphrase, or in the key file if that is
// "") and a new data key, and seals every value anew.
func (s *Store) Rekey(passphrase string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring == nil {
		id, key := newKey()
		return s.keep(&keyring{Version: 1, Current: id, keys: map[string][]byte{id: key}}, passphrase)
	}
	if s.ring.locked() {
		return errLocked
	}
	id, key := newKey()
	k := &keyring{Version: 1, Current: id, keys: maps.Clone(s.ring.keys)}
	k.keys[id] = key
	if err := s.keep(k, passphrase); err != nil {
		return err
	}
	for _, rid := range slices.Sorted(maps.Keys(s.items)) {
		n := *s.items[rid]
		data, err := s.open(&n)
		if err == nil {
			err = s.put(&n, data)
			clear(data)
		}
		if err != nil {
			return fault.New(fault.Of(err), "the master key was changed, but not every value sealed anew: %w", err)
		}
	}
	// The old data keys are of no use to anybody now.
	only := &keyring{Version: 1, Current: id, keys: map[string][]byte{id: key}}
	return s.keep(only, passphrase)
}
