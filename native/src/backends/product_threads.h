// Products of matrices that ExecuTorch's operators leave to MKL, where the process has that: no threads inside of
// threads.
#pragma once

namespace torchchat {

// For as long as this lives, the calling thread's products take no further threads.
class SerialProducts {
  public:
    SerialProducts();
    SerialProducts(const SerialProducts&) = delete;
    SerialProducts& operator=(const SerialProducts&) = delete;
    SerialProducts(SerialProducts&&) = delete;
    SerialProducts& operator=(SerialProducts&&) = delete;
    ~SerialProducts();

  private:
    int before_;
};

// The same, for good, for the threads of ExecuTorch's pool: attention has split the work among them already, and each
// would start as many threads again.
void make_pool_products_serial();

}  // namespace torchchat
