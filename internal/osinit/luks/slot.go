package luks

import (
	"crypto/aes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/xts"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	cipherName = "aes-xts-plain64"
	stripes    = 4000

	// A key of 256 random bits needs no slow derivation; words that people chose do.
	strongIterations = 1000
	maxIterations    = 10_000_000
	argonTime        = 4
	argonMemory      = 64 << 10 // KiB
	argonMaxMemory   = 1 << 20
	argonCPUs        = 2
)

// Strength is how well a secret can be guessed.
type Strength int

// Strengths.
const (
	Chosen Strength = iota // by people
	Random                 // 256 bits
)

var errSecret = fault.New(fault.Forbidden, "no key slot opens with this key")

func (d *digest) of(key []byte) ([]byte, error) {
	return pbkdf2.Key(sha256.New, string(key), d.Salt, d.Iterations, sha256.Size)
}

// derive makes the key that a slot's area is encrypted with.
func (k *kdf) derive(secret []byte, size int) ([]byte, error) {
	switch {
	case k.Type == "pbkdf2" && k.Hash == "sha256" && k.Iterations > 0 && k.Iterations <= maxIterations:
		return pbkdf2.Key(sha256.New, string(secret), k.Salt, k.Iterations, size)
	case k.Type == "argon2id" && k.Time > 0 && k.Time <= 100 && k.Memory >= 8*max(k.CPUs, 1) && k.Memory <= argonMaxMemory && k.CPUs > 0 && k.CPUs <= 64:
		return argon2.IDKey(secret, k.Salt, uint32(k.Time), uint32(k.Memory), uint8(k.CPUs), uint32(size)), nil
	}
	return nil, fault.New(fault.Unsupported, "the key slot is of a kind that is not known here")
}

// usable reports whether a slot is like those that are written here.
func (k *keySlot) usable() bool {
	return k.Type == "luks2" && k.KeySize == KeySize && k.AF.Type == "luks1" && k.AF.Stripes == stripes && k.AF.Hash == "sha256" &&
		k.Area.Type == "raw" && k.Area.Encryption == cipherName && (k.Area.KeySize == 32 || k.Area.KeySize == 64) &&
		k.Area.Offset >= 2*headerSize && k.Area.Offset%4096 == 0 && k.Area.Offset < 1<<30 && k.Area.Size >= KeySize*stripes
}

// Open returns the volume's key and the slot that a secret opens.
func (h *Header) Open(disk io.ReaderAt, secret []byte) ([]byte, int, error) {
	for _, name := range slices.Sorted(maps.Keys(h.meta.KeySlots)) {
		n, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		key, err := h.openSlot(disk, n, secret)
		if err == nil {
			return key, n, nil
		}
		if fault.Of(err) != fault.Forbidden && fault.Of(err) != fault.Unsupported {
			return nil, 0, err
		}
	}
	return nil, 0, errSecret
}

func (h *Header) openSlot(disk io.ReaderAt, n int, secret []byte) ([]byte, error) {
	k := h.meta.KeySlots[strconv.Itoa(n)]
	if k == nil || !k.usable() {
		return nil, fault.New(fault.Unsupported, "the key slot %d is of a kind that is not known here", n)
	}
	area := make([]byte, KeySize*stripes)
	if _, err := disk.ReadAt(area, int64(k.Area.Offset)); err != nil {
		return nil, fmt.Errorf("cannot read the key slot %d: %w", n, err)
	}
	derived, err := k.KDF.derive(secret, k.Area.KeySize)
	if err != nil {
		return nil, err
	}
	c, err := xts.NewCipher(aes.NewCipher, derived)
	if err != nil {
		return nil, err
	}
	for at := 0; at < len(area); at += 512 {
		c.Decrypt(area[at:at+512], area[at:at+512], uint64(at/512))
	}
	key := merge(area)
	d := h.meta.Digests["0"]
	sum, err := d.of(key)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(sum, d.Digest) != 1 {
		return nil, errSecret
	}
	return key, nil
}

// Add makes a slot that a secret opens, and returns its number. The header is to be written then.
func (h *Header) Add(disk Disk, key, secret []byte, s Strength) (int, error) {
	n := 0
	for ; h.meta.KeySlots[strconv.Itoa(n)] != nil; n++ {
	}
	if n >= maxSlots {
		return 0, fault.New(fault.Exhausted, "cannot add a key: all %d slots are in use", maxSlots)
	}
	d := h.meta.Digests["0"]
	if sum, err := d.of(key); err != nil || subtle.ConstantTimeCompare(sum, d.Digest) != 1 {
		return 0, errors.New("cannot add a key: this is not the volume's")
	}
	k := &keySlot{Type: "luks2", KeySize: KeySize}
	k.AF.Type, k.AF.Stripes, k.AF.Hash = "luks1", stripes, "sha256"
	k.Area.Type, k.Area.Encryption, k.Area.KeySize = "raw", cipherName, KeySize
	k.Area.Offset, k.Area.Size = number(2*headerSize+n*slotArea), slotArea
	salt := make([]byte, 32)
	rand.Read(salt)
	k.KDF = kdf{Type: "pbkdf2", Hash: "sha256", Iterations: strongIterations, Salt: salt}
	if s == Chosen {
		k.KDF = kdf{Type: "argon2id", Time: argonTime, Memory: argonMemory, CPUs: argonCPUs, Salt: salt}
	}
	derived, err := k.KDF.derive(secret, KeySize)
	if err != nil {
		return 0, err
	}
	c, err := xts.NewCipher(aes.NewCipher, derived)
	if err != nil {
		return 0, err
	}
	area := make([]byte, slotArea)
	copy(area, split(key))
	for at := 0; at < KeySize*stripes; at += 512 {
		c.Encrypt(area[at:at+512], area[at:at+512], uint64(at/512))
	}
	if _, err := disk.WriteAt(area, int64(k.Area.Offset)); err != nil {
		return 0, fmt.Errorf("cannot write a key slot: %w", err)
	}
	if err := disk.Sync(); err != nil {
		return 0, err
	}
	h.meta.KeySlots[strconv.Itoa(n)] = k
	d.KeySlots = append(d.KeySlots, strconv.Itoa(n))
	return n, nil
}

// Remove takes a slot and its tokens out of the header, which is written, and then overwrites its area.
func (h *Header) Remove(disk Disk, n int) error {
	name := strconv.Itoa(n)
	k := h.meta.KeySlots[name]
	if k == nil {
		return nil
	}
	if len(h.meta.KeySlots) == 1 {
		return fault.New(fault.Conflict, "cannot remove the last key slot")
	}
	delete(h.meta.KeySlots, name)
	maps.DeleteFunc(h.meta.Tokens, func(_ string, raw json.RawMessage) bool {
		var t token
		return json.Unmarshal(raw, &t) == nil && slices.Contains(t.KeySlots, name)
	})
	d := h.meta.Digests["0"]
	d.KeySlots = slices.DeleteFunc(d.KeySlots, func(s string) bool { return s == name })
	if err := h.Write(disk); err != nil {
		return err
	}
	if !k.usable() || uint64(k.Area.Offset)+slotArea > uint64(h.meta.Segments["0"].Offset) {
		return nil
	}
	noise := make([]byte, slotArea)
	rand.Read(noise)
	if _, err := disk.WriteAt(noise, int64(k.Area.Offset)); err != nil {
		return fmt.Errorf("cannot overwrite a key slot: %w", err)
	}
	return disk.Sync()
}

// split spreads a key over so many stripes that each bit of them is needed (LUKS' AF splitter).
func split(key []byte) []byte {
	out := make([]byte, len(key)*stripes)
	rand.Read(out[:len(key)*(stripes-1)])
	last := gather(out, len(key))
	subtle.XORBytes(out[len(key)*(stripes-1):], last, key)
	return out
}

func merge(b []byte) []byte {
	n := len(b) / stripes
	last := gather(b, n)
	subtle.XORBytes(last, last, b[n*(stripes-1):])
	return last
}

// gather mixes all stripes but the last.
func gather(b []byte, n int) []byte {
	acc := make([]byte, n)
	for i := range stripes - 1 {
		subtle.XORBytes(acc, acc, b[i*n:(i+1)*n])
		diffuse(acc)
	}
	return acc
}

// diffuse replaces each block of a hash's size by the hash of its number and itself.
func diffuse(b []byte) {
	h := sha256.New()
	var number [4]byte
	for i := 0; i*sha256.Size < len(b); i++ {
		part := b[i*sha256.Size : min((i+1)*sha256.Size, len(b))]
		h.Reset()
		binary.BigEndian.PutUint32(number[:], uint32(i))
		h.Write(number[:])
		h.Write(part)
		copy(part, h.Sum(nil))
	}
}
