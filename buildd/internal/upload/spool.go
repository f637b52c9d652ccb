package upload

import "os"

// named makes a file whose name is taken away where the system allows that.
func named(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "servin-context-*")
	if err != nil {
		return nil, err
	}
	_ = os.Remove(f.Name())
	return f, nil
}
